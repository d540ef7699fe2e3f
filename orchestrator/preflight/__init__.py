"""What can be proven before any GPU is paid for?"""
