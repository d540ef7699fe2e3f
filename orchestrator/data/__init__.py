"""How does a row of a file become prepared tokens, and in which order are they read?"""
