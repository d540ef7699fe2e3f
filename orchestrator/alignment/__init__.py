"""How are reward models, preference pairs and policies trained?"""
