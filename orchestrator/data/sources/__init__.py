"""Which files hold the rows, and what is in them?"""
