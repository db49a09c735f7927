"""The groups of commands of `megatron-hybrid`: a thin function a command, what is heavy inside."""
