"""What lies in a folder of prepared rows, and is it still what was asked for?"""
