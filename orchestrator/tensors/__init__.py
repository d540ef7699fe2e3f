"""How are tensors written to and read from safetensors files, in bounded memory?"""
