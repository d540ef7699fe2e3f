"""How is a file written durably, hashed and cached?"""
