"""Megatron-LM's arguments in a checkpoint: what they leave open is not made up."""

import pytest

from megatron_hybrid.checkpoint.errors import CheckpointError
from megatron_hybrid.checkpoint.megatron_arguments import run_values

ARGUMENTS = {"hybrid_layer_pattern": "M", "hidden_size": 32, "seq_length": 64}


def test_the_sequence_length_is_said_or_missing() -> None:
    """By either name; a model exported from it says so for how many tokens it is made."""
    assert run_values(ARGUMENTS)["data"] == {"seq_length": 64}
    older = ARGUMENTS | {"seq_length": None, "encoder_seq_length": 32}
    assert run_values(older)["data"] == {"seq_length": 32}
    with pytest.raises(CheckpointError, match="neither seq_length nor encoder_seq_length is set"):
        run_values(ARGUMENTS | {"seq_length": None})
