"""How good is an artifact: scores on named sets, its proof, its answers compared with those of the base?"""
