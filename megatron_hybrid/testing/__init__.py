"""Run a function on several real ranks, over gloo, from a test: ours and users'."""

from megatron_hybrid.testing.distributed import RankError, init_model_parallel, run_distributed

__all__ = ["RankError", "init_model_parallel", "run_distributed"]
