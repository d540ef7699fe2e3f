"""What runs on the ranks: torch is allowed here and in stages only."""
