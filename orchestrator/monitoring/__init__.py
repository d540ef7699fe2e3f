"""Where do runs stand, and what came of them?"""
