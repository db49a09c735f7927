"""Evaluation: losses of texts, token files and a run's own data by a checkpoint's model."""
