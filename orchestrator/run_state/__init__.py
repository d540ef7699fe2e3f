"""What was frozen, what may go on, and what counts as done?"""
