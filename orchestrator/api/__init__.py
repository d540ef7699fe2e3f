"""How is the tool used from Python?"""
