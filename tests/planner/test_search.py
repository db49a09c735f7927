"""The search for layouts: what it offers runs, fits and is the fastest of what it looked at."""

import pytest

from megatron_hybrid.config import load_config, rules, validate
from megatron_hybrid.errors import UserError
from megatron_hybrid.planner.hardware import GPUS, RESERVE_GIB
from megatron_hybrid.planner.memory import rank_memory
from megatron_hybrid.planner.search import GIB, search
from megatron_hybrid.planner.step_time import step_time

DATA = ["data.mock_data=true", "data.tokenizer_type=null", "model.vocab_size=131072"]


@pytest.mark.parametrize(("preset", "gpus"), [("nemotron_h_8b", 16), ("nemotron_h_56b", 512)])
def test_offers(preset: str, gpus: int) -> None:
    """Each is accepted by the run's own rules, fits, and is slower than the one before it."""
    config = load_config([preset, *DATA], which=rules.NO_FILES)
    h100 = GPUS["h100"]
    offers = search(config, gpus, h100, 5)
    assert len(offers) == 5
    speeds = [offer.time.tokens_per_s for offer in offers]
    assert speeds == sorted(speeds, reverse=True)
    for offer in offers:
        validate(offer.config, world_size=gpus, has_cuda=True)
        assert offer.peak_gib <= h100.memory_gib - RESERVE_GIB
        assert offer.memory == rank_memory(offer.config, gpus, fused=True)
        assert offer.time == step_time(offer.config, gpus, h100)
        assert offer.reason
        assert offer.config.training.global_batch_size == config.training.global_batch_size
        changed = offer.config.model.hybrid_layer_pattern.replace("|", "")
        assert changed == config.model.hybrid_layer_pattern


def test_experts_are_divided() -> None:
    """A MoE model on two nodes is offered expert parallelism among other layouts."""
    config = load_config(
        [
            "nemotron_h_8b", *DATA, "model.num_moe_experts=16", "model.moe_ffn_hidden_size=5376",
            f"model.hybrid_layer_pattern={'ME' * 8 + 'M*-'}",
        ],
        which=rules.NO_FILES,
    )  # fmt: skip
    offers = search(config, 8, GPUS["h100"], 20)
    assert {offer.config.parallel.expert_model_parallel_size for offer in offers} - {1}


def test_layers_of_unlike_experts_are_divided_together() -> None:
    """Over no more ranks than the layer with the fewest has, whatever the model's number is."""
    experts = "model.num_moe_experts=16", "model.layers.2.num_moe_experts=2"
    words = ("tiny", *DATA, *experts, "model.hybrid_layer_pattern=MEME", "--train-iters", "1")
    offers = search(load_config(words, which=rules.NO_FILES), 4, GPUS["h100"], 9)
    assert {offer.config.parallel.expert_model_parallel_size for offer in offers} == {1, 2}


def test_nothing_fits() -> None:
    """56 billion parameters on one GPU: what the smallest layout takes, and what there is."""
    config = load_config(["nemotron_h_56b", *DATA], which=rules.NO_FILES)
    with pytest.raises(UserError, match=r"no layout of this run fits: the smallest layout takes"):
        search(config, 1, GPUS["h100"], 1)


def test_what_fits_and_is_no_valid_run() -> None:
    """Later batches that three ranks cannot share: the rule is said, and not that memory lacks."""
    line = [
        "tiny", *DATA, "training.global_batch_size=18", "training.micro_batch_size=1",
        "training.train_iters=null", "training.train_tokens=1e9",
        "training.batch_size_schedule=[[1e6, 16]]",
    ]  # fmt: skip
    config = load_config(line, which=rules.NO_FILES)
    with pytest.raises(UserError) as caught:
        search(config, 3, GPUS["h100"], 1)
    said = str(caught.value)
    assert said.startswith("--gpus=3: no layout is a valid run; the fastest: 1 problem")
    assert "training.batch_size_schedule[0]: size=16 must be a multiple of" in said


def test_a_tighter_gpu_gets_other_layouts() -> None:
    """What does not fit an A100's half is not offered on it."""
    config = load_config(["nemotron_h_8b", *DATA], which=rules.NO_FILES)
    small = GPUS["a10g"]
    for offer in search(config, 32, small, 3):
        assert max(stage.total for stage in offer.memory) / GIB <= small.memory_gib - RESERVE_GIB
