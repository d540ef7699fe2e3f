"""How is a model loaded, tuned, saved and opened again?"""
