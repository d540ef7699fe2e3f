"""How do prepared rows become batches on a device?"""
