"""How are runs deleted, pruned and forked?"""
