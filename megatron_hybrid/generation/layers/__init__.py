"""The layers of a model as generation runs them, one a file, over their modules' own parameters.

A layer takes `[T, h]`, the residual stream of all tokens of a step, and returns it with its own
output added. It may overwrite what it is given. Sizes are this rank's.
"""
