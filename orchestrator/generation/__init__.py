"""How are completions sampled?"""
