"""Rewards that a program gives: the built-in ones, a user's own and how they are found; must not import torch."""
