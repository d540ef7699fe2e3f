"""Forecasts of memory, time, cost and goodput: pure arithmetic, no torch."""
