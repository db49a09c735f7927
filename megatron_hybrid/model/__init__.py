"""The network: its layer pattern, its counts, and how it is built from megatron-core's stack."""
