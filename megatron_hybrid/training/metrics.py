"""What a run reports of itself, in a file of lines of JSON: how it is read, and taken up again.

`metrics.jsonl` has one JSON object a line, its `kind` one of
  "train"       a training step: the fields of `StepMetrics`
  "validation"  an evaluation:   iteration, consumed_samples, consumed_tokens, loss, extra
  "expert_load" MoE: of a step's tokens, each expert's share: iteration, consumed_tokens, layers,
                shares by layer and expert
  "float8"      emulated float8: iteration, consumed_tokens, and how each linear's operands fit
                the format (`callbacks.float8_fit.summary`)
  "evaluation"  by `megatron-hybrid evaluate`: iteration and name of the checkpoint, seq_length,
                overlap, what was changed of data and texts, and by source and in total loss,
                perplexity and tokens
  "tasks"       of lm-eval, in the run (`training.eval_tasks`) or by `megatron-hybrid evaluate`:
                iteration, by task and group its metrics, samples, num_fewshot and version, and
                limit, max_length and the release of lm_eval
  "event"       anything else:   iteration, name, message
in the order in which they happened. Floats are written with all their digits, so that two runs
can be compared bit for bit; NaN and infinities, which JSON does not have, are written as null.
"""

import os
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import write_atomic

if TYPE_CHECKING:
    import torch

METRICS_FILE = "metrics.jsonl"
REWOUND_FILE = "metrics_rewound.jsonl"  # steps that were done again, as they were before
TENSORBOARD_FOLDER = "tensorboard"
TASKS = "tasks"  # a kind

# Under which names TensorBoard and trackers have the figures of a step.
_TAGS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "consumed_tokens": "progress/consumed_tokens",
    "tokens_per_s": "throughput/tokens_per_s",
    "model_tflops_per_rank": "throughput/model_tflops_per_rank",
    "step_ms": "throughput/step_ms",
    "peak_memory_gib": "memory/peak_gib",
}
# That no other figure of a step may have, whose tag would be theirs.
STEP_NAMES = frozenset(
    tag.removeprefix("train/") for tag in _TAGS.values() if tag.startswith("train/")
)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; half a line at its end, left by a kill, is passed over.

    Raises:
        UserError: there is no such file, or a line before the last is not a metrics record.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: is it the folder of a training run?") from None
    return list(_parse(path, lines))


def _parse(path: Path, lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            if number == len(lines):
                return
            record = None
        whole = isinstance(record, dict) and "kind" in record
        if not whole or type(record.get("iteration")) is not int:
            start = line[:80].decode(errors="replace")
            raise UserError(
                f"{path}:{number} is not a metrics record: {start!r}; "
                "mend the line or move the file away"
            )
        yield record


def truncate_after(path: Path, iteration: int) -> None:
    """Move what is newer than `iteration` from a metrics file to the end of REWOUND_FILE.

    The file is replaced as a whole. What an earlier start has reported is never lost: it may have
    been another run's, whose checkpoints are gone.

    Raises:
        UserError: a line before the last is not a metrics record.
    """
    if not path.exists():
        return
    records = read_records(path)
    data = _lines(record for record in records if record["iteration"] <= iteration)
    if data == path.read_bytes():
        return
    rewound = _lines(record for record in records if record["iteration"] > iteration)
    with path.with_name(REWOUND_FILE).open("ab", buffering=0) as file:
        file.write(rewound)
        os.fsync(file.fileno())
    write_atomic(path, data)


def _lines(records: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records)


def rewound_steps(run_dir: Path, iteration: int) -> tuple[int, float | None]:
    """What the metrics hold beyond `iteration`, at which a run goes on: steps to be done again.

    Returns:
        How many are recorded, and when the last step was done (seconds of the clock; None: there
        was none).
    """
    path = run_dir / METRICS_FILE
    if not path.exists():
        return 0, None
    steps = (r["iteration"] for r in read_records(path) if r["kind"] == "train")
    return max(0, max(steps, default=0) - iteration), path.stat().st_mtime


def seconds_of_steps(steps: Iterable[float], step_ms: Iterable[float], *, after: float) -> float:
    """How long all steps after one took, of which some are recorded: each stands for those between
    it and the one before it (`training.log_interval`).

    Args:
        steps: numbers of those that are recorded, ascending.
    """
    pairs = pairwise([after, *steps])
    return float(sum((b - a) * ms for (a, b), ms in zip(pairs, step_ms, strict=True))) / 1000


def peak_memory_gib(device: "torch.device") -> float:
    """The most memory used so far: allocated on the GPU, or resident of this process on the CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB here


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record, but for nulls, by the tags of TensorBoard and trackers.

    Kinds other than "train", "validation" and the run's own "tasks" have none: what `evaluate` adds
    is of any checkpoint, asked in any way.
    """
    found: dict[str, Any]
    if record["kind"] == "train":
        found = {tag: record.get(name) for name, tag in _TAGS.items()}
        found |= {f"train/{name}": value for name, value in record.get("extra", {}).items()}
        for field, tag in (("source_tokens", "data/tokens"), ("source_epochs", "data/epochs")):
            found |= {f"{tag}/{name}": value for name, value in record.get(field, {}).items()}
        found |= _expert_load(record.get("expert_load") or {"layers": []})
    elif record["kind"] == "validation":
        found = {"validation/loss": record["loss"]}
        found |= {f"validation/{name}": value for name, value in record.get("extra", {}).items()}
    elif record["kind"] == TASKS and "checkpoint" not in record:
        found = {
            f"tasks/{name}/{metric}": value
            for name, each in {**record["tasks"], **record["groups"]}.items()
            for metric, value in each["metrics"].items()
        }
    else:
        return {}
    return {tag: float(value) for tag, value in found.items() if value is not None}


def _expert_load(load: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"expert_load/{name}/layer_{number}": value
        for name, each in load.items()
        if name != "layers"
        for number, value in zip(load["layers"], each, strict=True)
    }
