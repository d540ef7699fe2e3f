"""How does a model train on every rank: loop, objectives, faults, finish?"""
