"""Which losses and log-probabilities are computed from tensors alone?"""
