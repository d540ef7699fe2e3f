"""How are classifiers trained, scored and used?"""
