"""Two sides' answers beside each other, place by place, and before the arbiter as their judge.

Legend: l tokens of a prompt, h hidden size, V vocabulary without padding.
"""

from collections.abc import Iterable, Sequence
from math import inf, isnan
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_converter.arbiter import Arbiter, Trace
from checkpoints_converter.errors import ConversionError
from checkpoints_converter.verify_report import Judgement, Row
from checkpoints_converter.verify_sides import Answer, Prompt
from megatron_hybrid.config.pattern import KINDS

TOLERANCE_LAYERS = 8
# How many times what fp32 makes of the arbiter's formulas, one token after the other, a side may be
# off. Scans in chunks add other numbers in another order: up to 5 was seen, in first layers.
ROUNDINGS = 10
# Of a tolerance; a model in which rounding does more than this cannot be judged.
MOST_TOLERANCES = 100

Places = list[Tensor]  # of a prompt: [l, h] after each block, [l, V] at the end


def grown(tolerance: float, layers: int) -> float:
    """A tolerance after so many layers: each adds its rounding, as a random walk adds up."""
    return tolerance * max(1.0, layers / TOLERANCE_LAYERS) ** 0.5


class Comparison:
    """Our answers and theirs to the same prompts.

    Args:
        pattern: our layers, of which each of their blocks is one or two.
        lengths: how many tokens of each prompt can be compared; those of one or none are left out.

    Raises:
        ConversionError: the models have no blocks in common, or nothing can be compared.
    """

    def __init__(
        self,
        pattern: str,
        prompts: Sequence[Prompt],
        lengths: Sequence[int],
        ours: Sequence[Answer],
        theirs: Sequence[Answer],
    ) -> None:
        self._blocks = len(theirs[0].residuals)
        self._layers, rest = divmod(len(pattern), self._blocks)
        if rest:
            raise ConversionError(
                f"transformers' model has {self._blocks} layers, ours {len(pattern)} ({pattern})"
            )
        self._pattern = pattern
        kept = [number for number, length in enumerate(lengths) if length > 1]
        if not kept:
            raise ConversionError(
                "two experts are alike but for rounding at the first tokens of every prompt, where "
                "either may be chosen, so nothing can be compared; give another --prompt"
            )
        self._tokens = [prompts[number].tokens[: lengths[number]] for number in kept]
        ends = [(block + 1) * self._layers - 1 for block in range(self._blocks)]
        self._ends = ends
        self._sides: dict[str, list[Places]] = {
            "ours": [self._places(ours[n], ends, lengths[n]) for n in kept],
            "transformers'": [
                self._places(theirs[n], range(self._blocks), lengths[n]) for n in kept
            ],
        }
        self._exact: list[Places] = []
        self._rounded: list[Places] = []

    def ask_arbiter(self, export: Path) -> None:
        """Have the arbiter compute the prompts, in float64 and in fp32, to judge `rows` by."""
        self._exact, self._rounded = (
            [self._places(arbiter.trace(tokens), self._ends) for tokens in self._tokens]
            for arbiter in (Arbiter(export), Arbiter(export, torch.float32))
        )

    def rows(self, tolerance: float) -> list[Row]:
        """A row for each of their blocks, and for the logits."""
        rows = []
        for block in range(self._blocks):
            end = self._ends[block] + 1
            kinds = ", ".join(KINDS[symbol] for symbol in self._pattern[end - self._layers : end])
            rows.append(self._row(block, f"layer {block}", kinds, grown(tolerance, end)))
        allowed = grown(tolerance, len(self._pattern))
        return [*rows, self._row(-1, "logits", "output layer", allowed)]

    def rows_of_sides(self, allowed: float) -> list[Row]:
        """A row for each side: its logits against the arbiter's."""
        return [
            _row(f"{name} logits", "against the float64 arbiter", _at(self._exact, -1),
                 _at(places, -1), allowed)
            for name, places in self._sides.items()
        ]  # fmt: skip

    @staticmethod
    def _places(answer: Answer | Trace, at: Iterable[int], length: int | None = None) -> Places:
        residuals = [answer.residuals[number][:length] for number in at]
        return [*residuals, answer.logits[:length]]

    def _row(self, place: int, part: str, kind: str, allowed: float) -> Row:
        sides = {name: _at(places, place) for name, places in self._sides.items()}
        judgement = None
        if self._exact:
            exact = _at(self._exact, place)
            rounding = _worst(_distances(exact, _at(self._rounded, place)))
            limit = min(max(allowed, ROUNDINGS * rounding), MOST_TOLERANCES * allowed)
            far = {name: _worst(_distances(exact, side)) for name, side in sides.items()}
            judgement = Judgement(far, limit)
        ours, theirs = sides.values()
        return _row(part, kind, ours, theirs, allowed, judgement)


def _at(places: Sequence[Places], place: int) -> list[Tensor]:
    """One place of every prompt."""
    return [each[place] for each in places]


def _row(
    part: str,
    kind: str,
    one: Sequence[Tensor],
    other: Sequence[Tensor],
    allowed: float,
    judgement: Judgement | None = None,
) -> Row:
    """The largest difference, in deviations of the first, over all prompts."""
    distances = _distances(one, other)
    number = distances.index(_worst(distances))
    difference = (one[number].double() - other[number].double()).abs().max().item()
    return Row(part, kind, difference, distances[number], allowed, judgement)


def _distances(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[float]:
    """Of each prompt, the largest difference in deviations of the first."""
    distances = []
    for a, b in zip(one, other, strict=True):
        difference, deviation = (
            (a.double() - b.double()).abs().max().item(),
            a.double().std().item(),
        )
        # A constant has none: any difference from it is too large.
        distances.append(difference / deviation if deviation else inf if difference else 0.0)
    return distances


def _worst(distances: Sequence[float]) -> float:
    """The largest; one that is no number is the worst."""
    return max(distances, key=lambda each: (isnan(each), each))
