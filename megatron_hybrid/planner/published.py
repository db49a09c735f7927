"""Published training runs beside what the planner says of them.

    python -m megatron_hybrid.planner.published [--output docs/planner.png]

prints every run of `published.yaml` with its prediction as a table in Markdown, and the errors by
kind of model on the half that was not used to calibrate `hardware.SHARES`.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_hybrid.config import RunConfig, build_config, rules
from megatron_hybrid.config.yaml_text import parse_yaml
from megatron_hybrid.human import say
from megatron_hybrid.planner.hardware import GPUS, RESERVE_GIB, SHARES, Gpu, Shares
from megatron_hybrid.planner.layer_time import Features
from megatron_hybrid.planner.memory import rank_memory
from megatron_hybrid.planner.step_time import StepTime, step_time


@dataclass(frozen=True)
class Run:
    """A published run.

    Attributes:
        name: model, GPUs and layout.
        kind: dense, moe or hybrid.
        features: what it had that a run of ours has not.
        tokens_per_s: of one GPU, as published.
        calibrates: whether the planner's constants were fitted to it; else they are judged by it.
    """

    name: str
    kind: str
    config: RunConfig
    gpus: int
    gpu: Gpu
    features: Features
    tokens_per_s: float
    source: str
    calibrates: bool

    def predict(self, shares: Shares = SHARES) -> StepTime:
        """What the planner says."""
        return step_time(self.config, self.gpus, self.gpu, self.features, shares)

    @property
    def spare_gib(self) -> float:
        """What the planner says is left on the fullest GPU; the run ran, so it is not below 0."""
        memory = rank_memory(self.config, self.gpus, fused=True, features=self.features)
        most = max(stage.total for stage in memory) / 2**30
        return self.gpu.memory_gib - RESERVE_GIB - most

    def error(self, shares: Shares = SHARES) -> float:
        """Predicted tokens a second over the published ones, less 1."""
        return self.predict(shares).tokens_per_s / self.gpus / self.tokens_per_s - 1


@cache
def published_runs() -> tuple[Run, ...]:
    """All of them, in the order of the file."""
    text = files("megatron_hybrid.planner").joinpath("published.yaml").read_text(encoding="utf-8")
    table = parse_yaml(text)
    models = {name: dict(model) for name, model in table["models"].items()}
    return tuple(
        _run(row, models[row["model"]], number) for number, row in enumerate(table["runs"])
    )


def _run(row: dict[str, Any], model: dict[str, Any], number: int) -> Run:
    model = dict(model)
    layers = model.pop("layers")
    pp, vp = row.get("pp", 1), row.get("vp", 1)
    model["hybrid_layer_pattern"] = _pattern(layers, pp, vp)
    model["position_embedding_type"] = "none" if "M" in layers else "rope"
    graphs, gpu = row.get("graphs", ()), GPUS[row["gpu"]]
    values = {
        "model": model,
        "data": {"tokenizer_type": "null", "mock_data": True, "seq_length": row["seq_length"]},
        "parallel": {
            "tensor_model_parallel_size": row.get("tp", 1),
            "sequence_parallel": row.get("tp", 1) > 1,
            "pipeline_model_parallel_size": pp,
            "context_parallel_size": row.get("cp", 1),
            "expert_model_parallel_size": row.get("ep", 1),
            "expert_tensor_parallel_size": 1,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
        "precision": {
            "recipe": row["precision"],
            "num_layers_at_start_in_bf16": 0,
            "num_layers_at_end_in_bf16": 0,
            "fp8_param_gather": row["precision"] in ("fp8_delayed", "fp8_tensorwise"),
        },
        "training": {
            "global_batch_size": row["gbs"], "micro_batch_size": row["mbs"], "train_iters": 100,
        },
        "optimizer": {"lr": 1e-4},
    }  # fmt: skip
    config = build_config(values, which=rules.NO_FILES, world_size=row["gpus"], has_cuda=True)
    pattern = config.model.hybrid_layer_pattern
    features = Features(
        graphs=(graphs,) if isinstance(graphs, str) else tuple(graphs),
        tp_overlap=row.get("tp_overlap", False),
        ep_overlap=row.get("ep_overlap", False),
        gradient_bytes=2,  # NeMo's and Megatron Bridge's performance recipes reduce in bf16
        recompute=tuple(row.get("recompute", ())),
    )
    sizes = "".join(
        f" {key.upper()}{row[key]}" for key in ("tp", "pp", "vp", "cp", "ep") if key in row
    )
    return Run(
        f"{row['model']} {row['gpus']}x{row['gpu']}{sizes} {row['precision']}",
        "hybrid" if "M" in pattern else "moe" if "E" in pattern else "dense",
        config, row["gpus"], gpu, features, float(row["tokens_per_s_per_gpu"]), row["source"],
        number % 2 == 0,
    )  # fmt: skip


def _pattern(layers: str, pp: int, vp: int) -> str:
    """A model's layers, cut into segments; `80 * *-` is the text `*-` eighty times.

    Where the segments do not divide the layers, the first and the last have fewer, as the
    published runs count embedding and loss for a layer each.
    """
    if "* " in layers:
        count, _, block = layers.partition(" * ")
        blocks = [block] * int(count)
    else:
        blocks = list(layers)
    segments = pp * vp
    if pp == 1:
        return "".join(blocks)
    size = -(-len(blocks) // segments)
    missing = size * segments - len(blocks)
    sizes = [size] * segments
    sizes[0] -= missing // 2
    sizes[-1] -= missing - missing // 2
    found, at = [], 0
    for each in sizes:
        found.append("".join(blocks[at : at + each]))
        at += each
    return "|".join(found)


@dataclass(frozen=True)
class Accuracy:
    """How far predictions were from published runs that were not used for calibration.

    Attributes:
        runs: how many.
        median, worst: of the errors of tokens a second, without their signs.
    """

    runs: int
    median: float
    worst: float

    @classmethod
    def of(cls, errors: Sequence[float]) -> "Accuracy":
        """Of errors with their signs."""
        sizes = [abs(error) for error in errors]
        return cls(len(sizes), round(statistics.median(sizes), 3), round(max(sizes), 3))


def measure_accuracy() -> dict[str, Accuracy]:
    """By kind of model, and of all of them; takes some seconds."""
    errors: dict[str, list[float]] = {"all": []}
    for run in published_runs():
        if not run.calibrates:
            error = run.error()
            errors["all"].append(error)
            errors.setdefault(run.kind, []).append(error)
    return {kind: Accuracy.of(found) for kind, found in errors.items()}


def table() -> str:
    """Every run, in Markdown."""
    lines = [
        "| run | published by | tokens/s a GPU | predicted | error | GiB to spare | used to |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in published_runs():
        found = run.predict().tokens_per_s / run.gpus
        use = "calibrate" if run.calibrates else "judge"
        lines.append(
            f"| {run.name} | {run.source} | {run.tokens_per_s:,.0f} | {found:,.0f} | "
            f"{found / run.tokens_per_s - 1:+.1%} | {run.spare_gib:.0f} | {use} |"
        )
    return "\n".join(lines)


def draw(output: Path) -> None:
    """Published against predicted speed into a PNG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from megatron_hybrid.plotting import COLORS, INK, PALE_INK, STYLE, save_png

    kinds = {"dense": COLORS[0], "moe": COLORS[3], "hybrid": COLORS[1]}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 6.4), dpi=160, facecolor="white")
        axes = figure.subplots()
        figure.subplots_adjust(left=0.11, right=0.97, top=0.86, bottom=0.1)
        ends = (250.0, 60000.0)
        for share, style in ((1.0, "-"), (1.25, ":"), (0.75, ":")):
            axes.plot(ends, [end * share for end in ends], style, color=PALE_INK, linewidth=1)
        for run in published_runs():
            color = kinds[run.kind]
            axes.plot(
                run.tokens_per_s, run.predict().tokens_per_s / run.gpus, "o", markersize=6,
                color=color, markerfacecolor="white" if run.calibrates else color,
            )  # fmt: skip
        for kind, color in kinds.items():
            axes.plot([], [], "o", color=color, label={"moe": "MoE"}.get(kind, kind))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(ends)
        axes.set_ylim(ends)
        axes.set_xlabel("published tokens a second and GPU")
        axes.set_ylabel("predicted")
        axes.legend(loc="lower right", frameon=False)
        found = measure_accuracy()["all"]
        figure.text(0.11, 0.945, "Planner against published runs", fontsize=15, color=INK,
                    fontweight="bold", va="center")  # fmt: skip
        figure.text(
            0.11, 0.9,
            f"filled: {found.runs} runs that were not used to calibrate it, median error "
            f"{found.median:.1%}, worst {found.worst:.1%}; dotted: 25 %",
            color=PALE_INK, va="center", fontsize=9.5,
        )  # fmt: skip
        save_png(figure, output)


def main() -> None:
    """Print the table; with --output, draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="draw published against predicted into a PNG")
    output = parser.parse_args().output
    say(table())
    for kind, found in measure_accuracy().items():
        say(f"\n{kind}: {found.runs} runs, median {found.median:.1%}, worst {found.worst:.1%}")
    if output is not None:
        draw(output)


if __name__ == "__main__":
    main()
