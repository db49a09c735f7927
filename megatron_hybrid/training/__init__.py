"""The training loop and what it needs around it: steps, checkpoints, metrics, signals, plots."""
