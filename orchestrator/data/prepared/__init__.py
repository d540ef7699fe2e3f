"""What does a folder of prepared rows contain, and does it still match its sources?"""
