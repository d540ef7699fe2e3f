"""How are prepared rows made: selection, encoding, packing, the files?"""
