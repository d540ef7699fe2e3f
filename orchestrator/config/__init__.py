"""Types, ranges and rules of a configuration."""
