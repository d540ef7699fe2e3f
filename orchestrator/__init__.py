"""Takes a pretrained language model to a fine-tuned, proven one."""

__version__ = "0.1.0"
