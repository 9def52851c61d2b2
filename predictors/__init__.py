"""Container resource prediction: how long, how much memory, how likely to fail."""
