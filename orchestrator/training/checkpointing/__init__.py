"""How is training state written, verified and restored?"""
