"""What is taken from a checkpoint, and what is left there."""

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)

from megatron_hybrid.checkpoint.saved_config import (
    other_functions,
    refuse_other_model,
    said_of_functions,
)
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.model import LayerConfig
from megatron_hybrid.errors import UserError
from megatron_hybrid.testing import run_distributed
from megatron_hybrid.training.checkpoint_state import (
    clear_padding,
    refuse_fewer_words,
    refuse_left_over,
)
from tests.training.runs import MOE, losses, outcomes, words

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


def test_weights_that_the_model_has_not_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine passes over them, as over the last layers of a deeper model; those of other ranks,
    and what is made of a tensor when it is read, are the model's."""

    def tensor(key: str) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(key, torch.ones(2))

    def others_too(everywhere: list[Any], own: set[str]) -> None:
        everywhere[:] = [own, {"decoder.layers.1.weight"}]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", others_too)
    halves = ShardedTensorFactory(
        "in_proj", torch.ones(2), lambda *_: [tensor("in_proj.x"), tensor("in_proj.z")], sum
    )
    asked = {"model": {"a": tensor("embedding"), "b": halves}}
    names = ["embedding", "in_proj.x", "in_proj.z", "decoder.layers.1.weight"]
    states = [
        "optimizer.state.exp_avg.decoder.layers.2.weight",
        "rng_state",
        "decoder._extra_state",
    ]
    present: dict[str, Any] = {name: tensor(name) for name in names}
    refuse_left_over(present | {f"{n}.": tensor(f"{n}._extra_state") for n in states}, asked)
    refuse_left_over(present | {name: tensor(name) for name in states[:1]}, asked)
    with pytest.raises(UserError, match=r"another model, with decoder\.layers\.2\.weight, which"):
        refuse_left_over(present | {"x": tensor("decoder.layers.2.weight")}, asked)


def test_sizes_of_layers_are_compared_layer_by_layer() -> None:
    """Whoever says them: shapes must be alike, what else differs is told of."""

    def model(**changes: Any) -> ModelConfig:
        return ModelConfig(
            hybrid_layer_pattern="M-*", hidden_size=8, mamba_num_heads=4, ffn_hidden_size=16,
            num_attention_heads=2, num_query_groups=2, kv_channels=4, vocab_size=8, **changes,
        )  # fmt: skip

    narrow = LayerConfig(ffn_hidden_size=8)
    saved = model(layers={"2": narrow})
    refuse_other_model(Path("it"), model(layers={"-": narrow, "M": LayerConfig()}), saved)
    refuse_other_model(Path("it"), saved.model_copy(update={"layers": {"1-3": narrow}}), saved)
    for other in (model(), model(layers={"2": LayerConfig(ffn_hidden_size=12)})):
        with pytest.raises(UserError, match=r"layers\.2\.ffn_hidden_size=1.*checkpoint 8"):
            refuse_other_model(Path("it"), other, saved)
    seen = model(layers={"2": narrow, "*": LayerConfig(window_size=(4, 0))})
    refuse_other_model(Path("it"), seen, saved)
    [told] = other_functions(seen, said_of_functions(saved))
    assert told == "model.layers.3.window_size=[4, 0] (there null)"
    assert other_functions(saved, said_of_functions(saved)) == []


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


def keep_states(on: bool) -> None:
    """On a rank: let all modules that Transformer Engine would serve keep a state, as its own do,
    and refuse the one that they saved, as its delayed scaling does.
    """
    from megatron_hybrid.model.served import SERVED

    def refuse(module: torch.nn.Module, state: Any) -> None:
        if state is not None:
            raise RuntimeError(f"Refusing to load pickled extra state for {type(module).__name__}")

    for part in SERVED.values():
        module, _, name = part.torch.partition(":")
        made = getattr(import_module(module), name)
        if part.transformer_engine.startswith("megatron.core.extensions") and on:
            made.get_extra_state = lambda self: torch.arange(3, dtype=torch.uint8)
            made.set_extra_state = refuse
        elif "get_extra_state" in vars(made) and not on:
            del made.get_extra_state, made.set_extra_state


def moved(run_dir: Path, whole: Path) -> tuple[list[str], list[str]]:
    """On a rank: a run whose modules have no states, have them, keep them, and lose them again;
    and one that is not interrupted.

    Returns:
        How each part ended, and the states in the last checkpoint that has any.
    """
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    ends = outcomes([words(whole, *MOE)])
    for iterations, on in ((1, False), (2, True), (3, True), (4, False)):
        keep_states(on)
        ends += outcomes([words(run_dir, *MOE, f"training.exit_interval={iterations}")])
    saved = load_sharded_metadata(str(run_dir / "checkpoints" / "iter_0000003"))
    return ends, [key for key in saved if "_extra_state" in key]


def test_states_of_modules_move_between_backends(tmp_path: Path) -> None:
    """A checkpoint loads whatever its modules keep beside their weights, and whatever those that
    load it would: with the losses of a run that was not interrupted.
    """
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    ends, states = run_distributed(moved, 1, parts, whole)[0]
    assert ends == ["finished"] + ["exit_interval"] * 4
    assert "decoder.final_norm._extra_state/shard_0_1" in states
    assert losses(parts) == losses(whole)


def generators(device: str, *, earlier: bool) -> dict[str, Any]:
    """The states of a run on `device`; `earlier`: as checkpoints had them that do not name it."""
    of_cuda = torch.zeros(16, dtype=torch.uint8)
    own = torch.get_rng_state() if device == "cpu" else of_cuda
    states = {
        "torch": torch.Generator().manual_seed(5).get_state(),
        "cuda": None if device == "cpu" else of_cuda,
        "tracker": {"model-parallel-rng": own},
    }
    return states if earlier else {"device": device, **states}


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(("saved", "here"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_generators_of_another_device_are_left(
    saved: str,
    here: str,
    earlier: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Between a CPU and a GPU generators start from the seed, and the run says so."""
    from megatron_hybrid.training import checkpoint_state

    tracker = SimpleNamespace(set_states=lambda states: pytest.fail("taken up"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here == "cuda")
    monkeypatch.setattr(checkpoint_state.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(checkpoint_state.tensor_parallel, "get_cuda_rng_tracker", lambda: tracker)
    before = torch.get_rng_state()
    with caplog.at_level("WARNING"):
        checkpoint_state.set_rng_state(generators(saved, earlier=earlier))
    assert torch.equal(torch.get_rng_state(), before)
    assert f"saved on {saved}, and this run is on {here}" in caplog.text
    assert "start from the seed" in caplog.text


@pytest.mark.parametrize(
    ("saved", "why"), [(None, "it holds no states of"), ((2, 1, 1), "another layout saved it")]
)
def test_it_is_said_why_generators_start_anew(
    saved: tuple[int, ...] | None,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What was pruned or upcycled has none, which is not the layout's doing."""
    from megatron_hybrid.training import checkpoint_state

    def states(shape: tuple[int, ...]) -> ShardedObject:
        return ShardedObject("rng_state", [], shape, (0,) * len(shape))

    monkeypatch.setattr(checkpoint_state.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(checkpoint_state, "rng_state", lambda: states((1, 1, 1)))
    present = {} if saved is None else {"rng": states(saved)}
    with caplog.at_level("INFO"):
        assert not checkpoint_state.same_grid(present)
        assert checkpoint_state.same_grid({"rng": states((1, 1, 1))})
    [said] = caplog.messages
    assert why in said
    assert said.endswith("random generators start from the seed")
