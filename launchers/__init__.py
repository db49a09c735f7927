"""Ways to start the ranks of one run; they know nothing of models."""
