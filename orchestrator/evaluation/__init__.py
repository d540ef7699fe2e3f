"""How good is an artifact: scores on named sets, its proof, its answers beside those of the base?"""
