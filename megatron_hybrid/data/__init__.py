"""Text to batches: tokenizers, indexed files, the blend and the loader; knows no model."""
