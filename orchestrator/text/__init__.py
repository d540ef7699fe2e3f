"""How are numbers and durations put in words?"""
