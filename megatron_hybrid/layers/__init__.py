"""Layers: parameters and parallelism, one layer a file; the math is in `megatron_hybrid.ops`.

They are handed to megatron-core through its `ModuleSpec`s (`megatron_hybrid.model.specs`) and keep
the parameter names, shapes and sharded-checkpoint keys of its Transformer Engine layers, so that a
checkpoint moves freely between the two backends.
"""
