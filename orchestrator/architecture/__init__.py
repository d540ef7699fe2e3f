"""What is known of a model without loading it: shapes, parameter counts, kernels, DeepSpeed settings?"""
