"""What is this machine: processor, GPUs, the number formats that they compute?"""
