"""Which packages are installed in this environment, and are they ours?"""
