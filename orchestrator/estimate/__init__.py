"""What a run will need, forecast from the facts of its model: no torch."""
