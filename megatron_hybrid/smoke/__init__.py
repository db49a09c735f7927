"""`megatron-hybrid smoke-test`: short real trainings that show whether an installation works.

Loads neither torch nor the engine: every training is the public command in processes of its own.
"""
