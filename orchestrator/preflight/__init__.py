"""What can be proven before any GPU time is spent?"""
