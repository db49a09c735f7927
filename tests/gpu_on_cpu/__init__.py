"""The path of GPUs, held on a CPU: Transformer Engine's own Python over torch's kernels.

`stand_in` puts a module in torch in place of the one that Transformer Engine compiles, and pretends
a device whose memory is the CPU's. All else is the real thing: Transformer Engine's modules, the
engine's wrappers of them, its optimizers and checkpoints, and the product.
"""
