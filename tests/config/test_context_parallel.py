"""How context-parallel ranks share layers with a state: what `auto` chooses, and says."""

import pytest

from megatron_hybrid.config import RunConfig, load_config, rules
from megatron_hybrid.config.rules.context_parallel import bytes_by_way, chosen_way, way_of_states
from tests.config.test_wrong_configs import NO_EXPERTS

AUTO = "parallel.mamba_cp_comm_type=auto"


def run(*more: str, cp: int = 2) -> RunConfig:
    line = [
        "tiny", "--mock-data", "--tokenizer-type", "null", "--vocab-size", "256",
        f"parallel.context_parallel_size={cp}", "--hybrid-layer-pattern", "M-M*", AUTO,
        *NO_EXPERTS.split(), *more,
    ]  # fmt: skip
    return load_config(line, which=rules.NO_FILES)


def test_fewer_bytes_are_chosen() -> None:
    """Those of the all-to-all grow with the longest sequence, those of states do not."""
    long, short = run("--seq-length", "16384"), run("--seq-length", "32")
    sent, of_short = bytes_by_way(long), bytes_by_way(short)
    assert sent["all_to_all"] == 512 * of_short["all_to_all"]
    assert sent["state_passing"] == of_short["state_passing"]
    assert way_of_states(long, "torch") == "state_passing"
    assert way_of_states(short, "torch") == "all_to_all"
    said = chosen_way(long, "torch")
    assert said is not None and said.startswith(f"{AUTO} is state_passing: a rank sends ")
    assert chosen_way(run(cp=1), "torch") is None


@pytest.mark.parametrize(
    ("more", "backend", "way"),
    [
        (("--seq-length", "16384"), "transformer_engine", "all_to_all"),
        (("--seq-length", "32", "model.mamba_num_heads=3", "model.mamba_num_groups=1"), "torch",
         "state_passing"),
        (("--seq-length", "16384", "model.num_meta_tokens=16", "data.packed_documents=true"),
         "torch", "all_to_all"),
    ],
    ids=["kernels of GPUs", "odd heads", "meta tokens"],
)  # fmt: skip
def test_only_what_can_be_done_is_chosen(more: tuple[str, ...], backend: str, way: str) -> None:
    """Whatever the bytes."""
    assert way_of_states(run(*more), backend) == way
