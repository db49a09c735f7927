"""Rows of the vocabulary that stand for no word, when a checkpoint is loaded."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_hybrid.checkpoint.saved_config import refuse_other_model
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.errors import UserError
from megatron_hybrid.training.checkpoint_state import clear_padding, refuse_fewer_words

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def test_padding_is_cleared_wherever_it_is() -> None:
    """Of both matrices, in the model and in every state of the optimizer, on every TP rank; other
    tensors stay, and so do words.
    """
    for rank in range(4):
        keys = {
            "model": {EMBEDDING: EMBEDDING, OUTPUT: OUTPUT, "other": "decoder.weight"},
            "optimizer": {0: {"param_state": {
                1: {state: f"optimizer.state.{state}.{EMBEDDING}"
                    for state in ("fp32_param", "exp_avg", "exp_avg_sq")},
                2: {"exp_avg": "optimizer.state.exp_avg.decoder.weight"},
            }}},
        }  # fmt: skip

        def tree(keys: object, rank: int = rank) -> object:
            if isinstance(keys, dict):
                return {name: tree(value) for name, value in keys.items()}
            return ShardedTensor.from_rank_offsets(str(keys), torch.ones(3, 2), (0, rank, 4))

        def ones(keys: object) -> object:
            if isinstance(keys, dict):
                return {name: ones(value) for name, value in keys.items()}
            return torch.ones(3, 2)

        state, loaded = tree(keys), ones(keys)
        assert isinstance(state, dict) and isinstance(loaded, dict)
        state["step"] = state["optimizer"][0]["groups"] = 7  # not every entry is a tensor
        clear_padding(state, loaded | {"iteration": 3}, words=5)
        expected = [min(max(5 - 3 * rank, 0), 3)] * 3
        for name, own in loaded["model"].items():
            rows = own.any(dim=1)
            if name == "other":
                assert rows.all()
            else:
                assert rows.sum() == expected[0] and own[: expected[0]].all()
        states = loaded["optimizer"][0]["param_state"]
        assert [int(own.any(dim=1).sum()) for own in states[1].values()] == expected
        assert states[2]["exp_avg"].all()


def test_a_word_without_a_row_is_refused() -> None:
    """The engine would fill it with zeros, in silence; rows for no word are cut."""
    present = {EMBEDDING: SimpleNamespace(global_shape=(64, 8))}
    refuse_fewer_words(present, 64)
    refuse_fewer_words(present, 3)
    with pytest.raises(UserError, match=f"{EMBEDDING} has 64 rows, fewer than model.vocab_size=65"):
        refuse_fewer_words(present, 65)


def test_one_model_however_it_is_padded() -> None:
    """Of the same words any padding loads; of others, only the same rows."""

    def model(words: int, multiple: int) -> ModelConfig:
        return ModelConfig(
            hybrid_layer_pattern="M", hidden_size=8, vocab_size=words,
            make_vocab_size_divisible_by=multiple,
        )  # fmt: skip

    saved = model(50, 1)
    for multiple in (1, 2, 512):
        refuse_other_model(Path("it"), model(50, multiple), saved)
    refuse_other_model(Path("it"), model(45, 10), saved)
    with pytest.raises(UserError, match=r"model\.padded_vocab_size=64, in the checkpoint 50"):
        refuse_other_model(Path("it"), model(49, 64), saved)
