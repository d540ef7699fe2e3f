"""How does an example become token ids and a mask of trained tokens?"""
