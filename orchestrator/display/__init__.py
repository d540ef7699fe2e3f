"""How is a plan, a forecast or a result shown to a person?"""
