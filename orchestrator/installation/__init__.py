"""Which packages stand in this environment, and are they ours?"""
