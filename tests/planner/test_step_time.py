"""Predicted steps: parts that add up, work that is the model's, and what changes make slower."""

import pytest

from megatron_hybrid.config import RunConfig, load_config, rules
from megatron_hybrid.model.counts import flops_per_token
from megatron_hybrid.planner.hardware import GPUS, SHARES, Gpu, gpu_called
from megatron_hybrid.planner.layer_time import Rank
from megatron_hybrid.planner.layout import layout_of
from megatron_hybrid.planner.memory import rank_memory
from megatron_hybrid.planner.schedule import simulate
from megatron_hybrid.planner.step_time import StepTime, chunk_work, step_time, transfer_seconds

H100 = GPUS["h100"]
BF16_SHARE = SHARES.products["hopper", "bf16"]


def run(*more: str, gpus: int = 64, preset: str = "nemotron_h_8b") -> RunConfig:
    return load_config(
        [
            preset, "data.tokenizer_type=null", "model.vocab_size=131072",
            "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false", *more,
        ],
        which=rules.NO_FILES, world_size=gpus, has_cuda=True,
    )  # fmt: skip


def planned(*more: str, gpus: int = 64, gpu: Gpu = H100) -> StepTime:
    return step_time(run(*more, gpus=gpus), gpus, gpu)


LAYOUTS = [
    [],
    ["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true"],
    ["parallel.pipeline_model_parallel_size=4"],
    ["parallel.context_parallel_size=4"],
    ["training.recompute_granularity=full", "training.recompute_method=uniform",
     "training.recompute_num_layers=1"],
]  # fmt: skip


@pytest.mark.parametrize("more", LAYOUTS, ids=str)
def test_parts_are_the_step(more: list[str]) -> None:
    """They add up to it, none is less than nothing, and MFU is below what products may reach."""
    found = planned(*more)
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert min(found.parts.values()) >= -1e-9
    assert 0.2 < found.mfu < BF16_SHARE
    assert found.tokens == 768 * 8192


def test_products_are_the_models() -> None:
    """The time of matrix products is that of the model's FLOPs, but for attention and the scan,
    and of the operands and results that are moved beside them.
    """
    config = run()
    flops = flops_per_token(config.model, 8192)
    rate = H100.bf16_tflops * 1e12 * BF16_SHARE * 64
    seconds = flops.total * 768 * 8192 / rate
    assert 1.0 < planned().parts["matrix products"] / seconds < 1.2


def test_what_costs_time() -> None:
    """TP's transfers, pipeline stages of few micro batches, recomputation; FP8 saves, H200 too."""
    plain = planned()
    tensor, pipeline, context, again = (planned(*more) for more in LAYOUTS[1:])
    assert tensor.parts["TP transfers"] > 0 == plain.parts["TP transfers"]
    assert context.parts["CP transfers"] > 0
    assert pipeline.bubble > 0.05 > abs(plain.bubble)
    assert again.parts["computed again"] == pytest.approx(
        (plain.parts["matrix products"] + plain.parts["attention and scan"]) / 3, rel=0.25
    )
    assert planned("precision.recipe=fp8_tensorwise").seconds < plain.seconds
    assert planned(gpu=GPUS["h200"]).seconds < plain.seconds
    plain, overlapped = (
        planned(f"parallel.overlap_grad_reduce={on}", f"parallel.overlap_param_gather={on}")
        for on in ("false", "true")
    )
    assert overlapped.exposed_communication < plain.exposed_communication


@pytest.mark.parametrize("micro_batches", [96, 97, 192])
def test_many_micro_batches(micro_batches: int) -> None:
    """Rounds that are not simulated take what they would take if they were."""
    size = f"training.global_batch_size={micro_batches}"
    config = run("parallel.pipeline_model_parallel_size=4", size, gpus=4)
    layout = layout_of(config, 4)
    rank = Rank(config, layout, H100)
    work = chunk_work(rank)
    costs = [[each.seconds for each in passes] for passes in zip(*work, strict=True)]
    transfer = transfer_seconds(rank)
    whole = simulate(*costs, 4, micro_batches, transfer=transfer).seconds
    found = step_time(config, 4, H100)
    rest = found.parts["gradients and parameters"] + found.parts["optimizer"]
    assert found.seconds - rest == pytest.approx(whole)


def test_end_layers_in_bf16_are_slower() -> None:
    """Under the Nemotron-H recipe the two layers at either end cost what they cost in BF16."""
    config = run("precision.recipe=fp8_tensorwise", "parallel.pipeline_model_parallel_size=26",
                 "training.global_batch_size=768", gpus=416)  # fmt: skip
    layout = layout_of(config, 416)
    assert all(len(chunk) == 2 for chunk in layout.chunks)
    rank = Rank(config, layout, H100)
    work = chunk_work(rank)
    other = run("parallel.pipeline_model_parallel_size=26", gpus=416)
    plain = chunk_work(Rank(other, layout, H100))
    assert layout.chunks[0] == layout.chunks[1] == "M-"
    assert work[0][0].products == pytest.approx(plain[0][0].products)
    assert work[1][0].products < 0.8 * plain[1][0].products


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA GB200", "gb200"),
        ("NVIDIA B200", "b200"), ("NVIDIA A10G", "a10g"), ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None), ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA A100-SXM4-40GB", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_kind_of_a_device(device: str, kind: str | None) -> None:
    """CUDA's names of devices lead to the kinds that the planner knows, and to no other."""
    found = gpu_called(device)
    assert (found and found.name) == kind


def test_recomputed_modules() -> None:
    """Each costs the forward pass of what it names and saves activations; the rest stays."""
    sizes = [
        "model.num_moe_experts=8", "model.moe_ffn_hidden_size=4096", "model.moe_router_topk=2",
        "model.moe_shared_expert_intermediate_size=4096", "gpu.cuda_graph_impl=none",
        "model.hybrid_layer_pattern=M-*EM-*E",
    ]  # fmt: skip

    def seen(*modules: str) -> tuple[float, float, int]:
        again = [
            "training.recompute_granularity=selective",
            f"training.recompute_modules=[{','.join(modules)}]",
        ] if modules else []  # fmt: skip
        config = run(*sizes, *again)
        found = step_time(config, 64, H100)
        rest = found.seconds - found.parts["computed again"]
        (memory,) = rank_memory(config, 64, fused=True)
        return found.parts["computed again"], rest, memory.activations

    nothing, rest, kept = seen()
    assert nothing == 0
    one = {name: seen(name) for name in ("core_attn", "mlp", "moe", "shared_experts")}
    for again, other, less in one.values():
        assert again > 0 and less < kept
        assert other == pytest.approx(rest)
    config = run(*sizes)
    layout = layout_of(config, 64)
    forward = Rank(config, layout, H100).layer("-", fp8=False)[0].seconds
    assert one["mlp"][0] == pytest.approx(2 * layout.micro_batches * forward)
    assert one["shared_experts"][0] < one["moe"][0]
    together = seen("core_attn", "mlp", "moe")
    assert together[0] == pytest.approx(sum(one[name][0] for name in ("core_attn", "mlp", "moe")))
