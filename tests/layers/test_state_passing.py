"""Context parallelism by states: what passes between chunks, and how many bytes that is."""

from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.config.context_parallel import exchanged_bytes, passed_bytes
from megatron_hybrid.config.layers import Layer, layers
from megatron_hybrid.testing import init_model_parallel, run_distributed
from megatron_hybrid.testing.traffic import Traffic
from tests.distributed.layouts import PASSING, STATES, layout_config

LENGTHS = [1024, 4096]
RANKS, CHUNK, HEADS, HEAD_DIM, STATE, TAPS = 3, 4, 3, 4, 5, 4
CHANNELS, LENGTH = HEADS * HEAD_DIM, 2 * RANKS * CHUNK
WIDTH = 2 * CHANNELS + 2 * STATE + HEADS


def core_over(row: Tensor, seq_idx: Tensor, parameters: list[Tensor], group: Any) -> Tensor:
    """The core of Mamba-2 over this rank's part `[s, b, w]` of rows, as its mixer goes over it."""
    from megatron_hybrid.layers import state_passing as passing
    from megatron_hybrid.ops.mamba2 import mamba2_split_conv1d_scan
    from megatron_hybrid.ops.mamba2_summary import mamba2_chunk_summary

    sizes = {"head_dim": HEAD_DIM, "num_groups": 1}
    documents = passing.chunk_documents(seq_idx, TAPS - 1, group)
    rows = passing.to_chunks(row)
    before = passing.inputs_before(rows[..., CHANNELS:-HEADS], TAPS - 1, documents, group)
    decay, added = mamba2_chunk_summary(
        rows, *parameters[:4], before=before, seq_idx=documents.seq_idx, **sizes
    )
    states = passing.states_before(decay[..., None, None], added, documents, group)
    y = mamba2_split_conv1d_scan(
        rows, *parameters, seq_idx=documents.seq_idx, before=before, initial_states=states, **sizes
    )
    return passing.from_chunks(y)


def drawn(decay: float | None) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Rows `[l, b, w]` of which each begins a document at another place, parameters, documents and
    a gradient; `decay`, if not None, of each chunk, without a document's start."""
    draws = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    batch = LENGTH if decay is None else 2
    zxbcdt = normal(LENGTH, batch, WIDTH)
    parameters = [
        normal(CHANNELS + 2 * STATE, TAPS) / 2, normal(CHANNELS + 2 * STATE), normal(HEADS) - 2,
        -torch.rand(HEADS, generator=draws, dtype=torch.float64), normal(HEADS),
    ]  # fmt: skip
    starts = torch.eye(LENGTH, dtype=torch.int64)[:batch].cumsum(1)
    if decay is not None:
        starts = torch.zeros_like(starts)
        # softplus(1) a step.
        zxbcdt[..., -HEADS:], parameters[2] = 0.0, torch.ones(HEADS, dtype=torch.float64)
        step = float(torch.nn.functional.softplus(torch.ones(())))
        parameters[3] = torch.full((HEADS,), decay / (CHUNK * step), dtype=torch.float64)
    return zxbcdt, parameters, starts, normal(LENGTH, batch, CHANNELS)


def compare(decays: list[float | None]) -> list[dict[str, float]]:
    """On a rank: relative errors of y and all gradients, by the logarithm of a chunk's decay."""
    from megatron.core import parallel_state

    from megatron_hybrid.layers.context_parallel import local_chunks
    from megatron_hybrid.ops.mamba2 import mamba2_split_conv1d_scan

    init_model_parallel(context_parallel_size=RANKS)
    group, results = parallel_state.get_context_parallel_group(), []
    for decay in decays:
        zxbcdt, parameters, seq_idx, grad = drawn(decay)
        mine = torch.cat([torch.arange(*chunk) for chunk in local_chunks(LENGTH, group)])
        inputs = [each.requires_grad_() for each in (zxbcdt, *parameters)]
        whole = mamba2_split_conv1d_scan(
            zxbcdt.transpose(0, 1), *parameters, head_dim=HEAD_DIM, num_groups=1, seq_idx=seq_idx,
        ).transpose(0, 1)  # fmt: skip
        wanted = [whole, *torch.autograd.grad(whole, inputs, grad)]
        y = core_over(zxbcdt[mine], seq_idx, parameters, group)
        found = [*torch.autograd.grad(y, inputs, grad[mine])]
        for each in found:
            torch.distributed.all_reduce(each, group=group)
        names = ("y", "zxbcdt", "conv1d_weight", "conv1d_bias", "dt_bias", "A", "D")
        wanted[0] = wanted[0][mine]
        results.append({
            name: float(((got - want).norm() / want.norm()).detach())
            for name, got, want in zip(names, [y, *found], wanted, strict=True)
        })  # fmt: skip
    return results


def test_chunks_equal_the_whole() -> None:
    """Outputs and gradients of three ranks in float64: with a document that begins at any token,
    and with decays of a chunk from next to one to next to nothing."""
    decays = [None, -1e-6, -1.0, -80.0]
    for errors in run_distributed(compare, RANKS, decays):
        for decay, of_names in zip(decays, errors, strict=True):
            for name, error in of_names.items():
                assert error < 1e-9, f"{name} at {decay}: {error:.1e}"


def bytes_of_steps(lengths: list[int]) -> dict[str, list[float]]:
    """On a rank: bytes sent forward and backward, at each length, by mixers of Mamba-2 by an
    all-to-all, and of all kinds by state passing."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module

    from megatron_hybrid.layers.gated_delta_net import GatedDeltaNet
    from megatron_hybrid.model.specs import mamba_mixer_spec
    from megatron_hybrid.model.transformer_config import layer_configs

    init_model_parallel(context_parallel_size=2)
    config = layout_config(PASSING[0], STATES, packed=False, recompute=False)
    configs = layer_configs(config, "torch", torch.device("cpu"))
    common = {"pg_collection": ProcessGroupCollection.use_mpu_process_groups(), "layer_number": 1}
    mamba2, mamba1, delta = (layers(config.model)[place] for place in (0, 1, 3))

    def mamba(layer: Layer, state_passing: bool) -> torch.nn.Module:
        spec = mamba_mixer_spec("torch", layer.model, state_passing=state_passing)
        return build_module(spec, configs[layer.number], d_model=64, **common)

    linears = mamba_mixer_spec("torch", mamba2.model).submodules
    mixers = {
        "all_to_all": mamba(mamba2, False), "Mamba-2": mamba(mamba2, True),
        "Mamba-1": mamba(mamba1, True),
        "GDN": GatedDeltaNet(configs[delta.number], linears, state_passing=True, **common),
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in mixers}
    for name, mixer in mixers.items():
        for length in lengths:
            hidden = torch.randn(length // 2, 1, 64, requires_grad=True)
            with Traffic(ranks=2) as traffic:
                mixer(hidden)[0].sum().backward()
            found[name].append(traffic.sent_bytes)
    return found


def test_bytes_do_not_grow_with_the_sequence() -> None:
    """They are those of two states and the ends of two chunks a pass, at most, and what the planner
    goes by; of the all-to-all, more than ten times as many at 4096 tokens."""
    model = layout_config(PASSING[0], STATES, packed=False, recompute=False).model
    sizes = [layers(model)[place].model for place in (0, 1, 3)]
    passed = [
        2 * passed_bytes(of_layer, kind, tp=1, samples=1, number_bytes=4).sent(cp=2)
        for of_layer, kind in zip(sizes, "MMG", strict=True)
    ]
    for found in run_distributed(bytes_of_steps, 2, LENGTHS):
        exchanged = [
            2 * exchanged_bytes(sizes[0], "M", tp=1, cp=2, tokens=length / 2, number_bytes=4)
            for length in LENGTHS
        ]
        assert found["all_to_all"] == exchanged
        assert 10 * passed[0] < exchanged[-1]
        for kind, sent in zip(("Mamba-2", "Mamba-1", "GDN"), passed, strict=True):
            assert found[kind] == [sent, sent]
