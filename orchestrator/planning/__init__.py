"""What a configuration will do on this machine, and what would fit; must not import torch."""
