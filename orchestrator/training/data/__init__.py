"""From rows of a file to batches of tensors; must not import `launchers`."""
