"""Which bytes does a real module hold, traced without computing anything?"""
