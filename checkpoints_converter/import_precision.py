"""In which precision an imported model goes on, and what that rounds of its weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from checkpoints_converter.errors import ConversionError
from checkpoints_converter.fields import Fields
from checkpoints_converter.safetensors_files import SafetensorsReader
from checkpoints_converter.streaming import DTYPES
from checkpoints_converter.weights import Recipe


def refuse_dtypes(source: Path, dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuse tensors of dtypes that no weights here have.

    Raises:
        ConversionError: the first of them.
    """
    odd = [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in DTYPES.values()]
    if odd:
        allowed = ", ".join(map(str, DTYPES.values()))
        raise ConversionError(f"{source}: {'; '.join(odd[:3])}; allowed: {allowed}")


def precision_recipe(reader: SafetensorsReader, asked: str | None, fields: Fields) -> str:
    """`precision.recipe` of a model: bf16 where most of its weights are, else fp32.

    There is no fp16 here, and bf16 would cut 3 bits off each of its numbers.

    Args:
        asked: of the weights, a key of DTYPES; None as they are stored.
    """
    numbers: dict[torch.dtype, int] = {}
    for entry in reader.tensors.values():
        numbers[entry.dtype] = numbers.get(entry.dtype, 0) + torch.Size(entry.shape).numel()
    commonest = max(numbers, key=lambda dtype: numbers[dtype], default=torch.float32)
    said = fields.values.get("dtype") or fields.values.get("torch_dtype")
    if said is not None and said != _name(commonest):
        fields.notes.append(f"config.json says dtype={said!r}, its weights are {_name(commonest)}")
    stored = commonest if asked is None else DTYPES[asked]
    if stored == torch.float16:
        fields.notes.append(
            "its weights are float16, in which nothing is trained here: precision.recipe=fp32, as "
            "bf16 would round them (--dtype bf16 does)"
        )
    return "bf16" if stored == torch.bfloat16 else "fp32"


def note_rounded(plan: Sequence[tuple[Recipe, torch.dtype]], recipe: str, fields: Fields) -> None:
    """Say which tensors a run in bf16 would round, which keeps decays and routing in fp32."""
    if recipe != "bf16":
        return
    rounded = [
        made.spec.name for made, dtype in plan if dtype != torch.bfloat16 and not made.spec.fp32
    ]
    if rounded:
        more = f" and {len(rounded) - 3} more" if len(rounded) > 3 else ""
        fields.notes.append(
            f"a run with precision.recipe=bf16 rounds {', '.join(rounded[:3])}{more}, which are "
            "stored with more bits; precision.recipe=fp32 does not"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
