"""Distributed training of hybrid Mamba-Transformer language models on megatron-core.

Importing this package loads neither torch nor the engine: they load with the parts that use them.
"""

__version__ = "0.1.0"
