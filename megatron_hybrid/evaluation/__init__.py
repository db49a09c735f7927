"""Evaluation: losses of texts and token files, and tasks of lm-eval, by a checkpoint's model."""
