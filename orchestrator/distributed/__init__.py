"""What do ranks share: Accelerator, ZeRO shards, gathering, random states?"""
