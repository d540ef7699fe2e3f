"""How is a plan started, submitted, followed, ended and proven resumable?"""
