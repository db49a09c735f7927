"""Weights & Biases and MLflow: services in which teams look at their runs.

What they hold is a copy of `metrics.jsonl`, which a process of its own keeps for each of them
(`follow.py`): a service that is slow or away costs no step, and what it has missed is sent when it
is there again, at the run's next start, or by `megatron-hybrid track RUN_DIR`. What has arrived is
asked of the service itself (`Tracker.open`), so that no step is there twice and none is missing,
however the run, or the process that copies, was ended.
"""
