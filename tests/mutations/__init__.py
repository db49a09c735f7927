"""Mutated inputs, drawn from a seed: configs, words, checkpoints, token files, model folders.

    python -m tests.mutations --count 500 --seed 0

draws and runs them; `test_mutations.py` runs a few. See `cases.py` for what is drawn and
`outcome.py` for what may come of it.
"""
