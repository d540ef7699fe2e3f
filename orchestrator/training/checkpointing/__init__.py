"""How is the state of a training written, verified and restored?"""
