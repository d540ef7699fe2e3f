"""What lies in a run folder, and under which names?"""
