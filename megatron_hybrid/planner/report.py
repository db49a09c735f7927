"""What a plan says, as tables and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.pattern import KINDS, MAMBA, MOE, has_kind
from megatron_hybrid.config.precision import FLOAT8_RECIPES
from megatron_hybrid.human import human_count
from megatron_hybrid.model.counts import Flops, count_parameters, flops_per_token
from megatron_hybrid.planner.generation import GenerationMemory, generation_memory
from megatron_hybrid.planner.hardware import RESERVE_GIB, Gpu
from megatron_hybrid.planner.layer_time import Features
from megatron_hybrid.planner.layout import Layout, layout_of
from megatron_hybrid.planner.memory import PARTS, StageMemory, rank_memory
from megatron_hybrid.planner.search import Offer
from megatron_hybrid.planner.step_time import StepTime, step_time

GIB = 2**30
# What `published.measure_accuracy` finds (a test holds them together): runs, median, worst.
ACCURACY = {"dense": (14, 0.068, 0.228), "moe": (7, 0.055, 0.174), "hybrid": (3, 0.162, 0.172)}


@dataclass(frozen=True)
class Report:
    """A plan of one layout.

    Attributes:
        generation: the memory to generate text, where that was asked for.
    """

    config: RunConfig
    gpu: Gpu
    layout: Layout
    memory: tuple[StageMemory, ...]
    time: StepTime
    flops: Flops
    generation: GenerationMemory | None

    @classmethod
    def of(
        cls,
        config: RunConfig,
        gpus: int,
        gpu: Gpu,
        context_tokens: int | None = None,
        batch: int = 1,
    ) -> "Report":
        """Plan a valid config."""
        layout = layout_of(config, gpus)
        generation = None
        if context_tokens is not None:
            number_bytes = 2 if config.precision.weights == "bf16" else 4
            generation = generation_memory(
                config.model, context_tokens, batch, number_bytes=number_bytes
            )
        return cls(
            config, gpu, layout, rank_memory(config, gpus, fused=True),
            step_time(config, gpus, gpu),
            flops_per_token(config.model, layout.seq_length - config.model.num_meta_tokens),
            generation,
        )  # fmt: skip

    @property
    def spare_gib(self) -> float:
        """Left on the fullest GPU; less than 0: so much too little."""
        peak = max(stage.total for stage in self.memory) / GIB
        return self.gpu.memory_gib - RESERVE_GIB - peak

    @property
    def fits(self) -> bool:
        return self.spare_gib >= 0

    @property
    def title(self) -> str:
        """Model and cluster."""
        count = human_count(count_parameters(self.config.model).total, 2)
        return f"{count} parameters on {self.layout.world_size} x {self.gpu.name}"

    @property
    def summary(self) -> str:
        """The layout, and whether it fits."""
        verdict = (
            f"fits, {self.spare_gib:.1f} GiB to spare"
            if self.fits
            else f"DOES NOT FIT: {-self.spare_gib:.1f} GiB too little"
        )
        return f"{layout_text(self.layout, self.config)}: {verdict}"

    def to_dict(self) -> dict[str, Any]:
        """For programs: bytes, seconds and FLOPs."""
        return {
            "layout": asdict(self.layout),
            "hybrid_layer_pattern": self.config.model.hybrid_layer_pattern,
            "recompute_granularity": self.config.training.recompute_granularity,
            "recompute_modules": list(Features.of(self.config).recompute),
            "memory": [asdict(stage) | {"total": stage.total} for stage in self.memory],
            "fits": self.fits,
            "spare_gib": self.spare_gib,
            "step": asdict(self.time) | {
                "tokens_per_s": self.time.tokens_per_s, "bubble": self.time.bubble,
                "exposed_communication": self.time.exposed_communication,
            },
            "flops_per_token": {
                **self.flops.by_kind,
                "logits": self.flops.logits,
                **({"prediction": self.flops.prediction} if self.flops.prediction else {}),
            },
            "generation": None if self.generation is None else asdict(self.generation),
        }  # fmt: skip


def kind_of_model(pattern: str) -> str:
    """The kind under which published runs are counted."""
    if has_kind(pattern, MAMBA):
        return "hybrid"
    return "moe" if MOE in pattern else "dense"


def footnote(config: RunConfig, gpu: Gpu) -> str:
    """How far predictions have been right for models of this kind, and whether it is tried here."""
    kind = kind_of_model(config.model.hybrid_layer_pattern)
    runs, median, worst = ACCURACY[kind]
    name = {"moe": "MoE"}.get(kind, kind)
    tried = config.precision.recipe in FLOAT8_RECIPES and gpu.generation != "ampere"
    return (
        f"Predicted, not measured: of {runs} published runs of {name} models that the planner was "
        f"not calibrated on, tokens/s were off by {median:.0%} in the median and {worst:.0%} at "
        "worst, and all of them fit (docs/planner.md)."
        + ("" if tried else f" None was in {config.precision.recipe} on a {gpu.name}'s generation.")
    )


def layout_text(layout: Layout, config: RunConfig) -> str:
    """Such as "TP8 PP4x2 DP16, micro batch 1 x 48"."""
    sizes = [f"TP{layout.tp}"]
    if layout.pp > 1:
        sizes.append(f"PP{layout.pp}" + (f"x{layout.vpp}" if layout.vpp > 1 else ""))
    if layout.cp > 1:
        sizes.append(f"CP{layout.cp}" + (" (states passed)" if layout.passes_states else ""))
    sizes += [f"EP{layout.ep}"] if layout.ep > 1 else []
    again = ", recomputed" if config.training.recompute_granularity == "full" else ""
    if modules := Features.of(config).recompute:
        again = f", {', '.join(modules)} recomputed"
    sizes.append(f"DP{layout.dp}, micro batch {layout.micro_batch} x {layout.micro_batches}{again}")
    return " ".join(sizes)


def print_report(report: Report, console: Console) -> None:
    """The tables of one layout."""
    console.print(f"\n[bold]{report.title}[/]\n{report.summary}\n", highlight=False)
    parts = [p for p in PARTS if p != "frozen" or any(stage.frozen for stage in report.memory)]
    table = _table("stage", "layers", "count", *(p.replace("_", " ") for p in parts),
                   "total GiB")  # fmt: skip
    for stage in report.memory:
        table.add_row(
            str(stage.stage), _layers(stage), human_count(stage.parameter_count, 2),
            *(f"{getattr(stage, part) / GIB:.2f}" for part in parts),
            f"[bold]{stage.total / GIB:.2f}[/]",
        )  # fmt: skip
    console.print(table)
    time = report.time
    table = _table("a step", "seconds", "share")
    for name, seconds in time.parts.items():
        if seconds >= 5e-5 * time.seconds:
            table.add_row(name, f"{seconds:.4f}", f"{seconds / time.seconds:.1%}")
    table.add_row("[bold]in all[/]", f"[bold]{time.seconds:.4f}[/]", "")
    console.print(table)
    console.print(
        f"{human_count(time.tokens_per_s, 2)} tokens/s, "
        f"{human_count(time.tokens_per_s / report.layout.world_size, 2)} a GPU; MFU {time.mfu:.1%} "
        f"of the peak in BF16; bubble {time.bubble:.1%}; exposed communication "
        f"{time.exposed_communication:.1%}",
        highlight=False,
    )
    shares = [f"{KINDS[kind]} {flops / report.flops.total:.1%}"
              for kind, flops in report.flops.by_kind.items()]  # fmt: skip
    shares.append(f"output layer {report.flops.logits / report.flops.total:.1%}")
    if report.flops.prediction:
        shares.append(f"multi-token prediction {report.flops.prediction / report.flops.total:.1%}")
    console.print(
        f"{human_count(report.flops.total, 2)} FLOPs a token: {', '.join(shares)}", highlight=False
    )
    if report.generation is not None:
        _print_generation(report, report.generation, console)
    console.print(footnote(report.config, report.gpu), style="dim")


def _print_generation(report: Report, memory: GenerationMemory, console: Console) -> None:
    parts = ", ".join(
        f"{name.replace('_', ' ')} {size / GIB:.2f}" for name, size in asdict(memory).items()
    )
    fits = memory.total / GIB <= report.gpu.memory_gib - RESERVE_GIB
    console.print(
        f"to generate on one {report.gpu.name}: {memory.total / GIB:.2f} GiB ({parts}), "
        f"{'fits' if fits else 'does not fit'}",
        highlight=False,
    )


def print_offers(offers: Sequence[Offer], gpus: int, gpu: Gpu, console: Console) -> None:
    """The table of a search."""
    table = _table("layout", "tokens/s", "MFU", "bubble", "GiB", "where the time goes")
    for offer in offers:
        table.add_row(
            layout_text(layout_of(offer.config, gpus), offer.config),
            human_count(offer.time.tokens_per_s, 2), f"{offer.time.mfu:.1%}",
            f"{max(0.0, offer.time.bubble):.1%}", f"{offer.peak_gib:.1f}", offer.reason,
        )  # fmt: skip
    console.print(f"\n[bold]the fastest layouts on {gpus} x {gpu.name}[/]")
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for number, name in enumerate(columns):
        text = name in ("layout", "layers", "where the time goes", "a step")
        left = text or number == 0
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    return table


def _layers(stage: StageMemory) -> str:
    text = " | ".join(stage.layers)
    if len(text) <= 26:
        return text
    count, segments = len("".join(stage.layers)), len(stage.layers)
    inside = f"{count} in {segments} segments" if segments > 1 else f"{count}"
    return f"{text[:12]}...{text[-10:]} ({inside})"
