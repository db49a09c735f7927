"""Tests of the config, and the words of a good one that they start from."""

GOOD = ("tiny", "--mock-data", "--tokenizer-type", "null", "--vocab-size", "256")
