"""Which losses and log-probabilities are there, as functions of tensors alone?"""
