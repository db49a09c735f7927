"""What a family of models is to the converter, and how its config.json is judged."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from checkpoints_converter.fields import Fields, Rules
from checkpoints_converter.weights import Mapping as WeightMapping
from checkpoints_converter.weights import Names
from megatron_hybrid.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """A family of models; a module each, with one table for both directions.

    Attributes:
        model_type, architecture: as its config.json says them.
        cannot_hold: why the family cannot hold a model of ours exactly, one sentence a field.
        config: its config.json fields of a model of ours that it can hold.
        fields: a rule for every field that its config.json can have.
        model: the fields of our `model` section of a config.json; what stands against it goes to
            `Fields.problems`.
        table: every tensor of a model, on both sides.
        grouped_norm_since: the release of transformers from which on the family's gated norm is
            applied to each group, as it is here; None if it always was.
        multiplied: of `config.layers.multiplied`, the fields that it holds.
        parallel_heads: whether it has layers of attention and Mamba side by side.
        takes_unlike: whether it looks at each layer's own sizes, and at Mamba-1.
        in_transformers: whether transformers has its code; others are published with code of their
            own, which is not run here.
        left_out: how names of its tensors begin that belong to no part of the model here.
    """

    model_type: str
    architecture: str
    cannot_hold: Callable[[ModelConfig], list[str]]
    config: Callable[[ModelConfig], dict[str, Any]]
    fields: Rules
    model: Callable[[Fields], dict[str, Any]]
    table: Callable[[ModelConfig, Names, Names], list[WeightMapping]]
    grouped_norm_since: str | None = None
    multiplied: Collection[str] = ()
    parallel_heads: bool = False
    takes_unlike: bool = False
    in_transformers: bool = True
    left_out: tuple[str, ...] = ()

    def read(
        self, values: Mapping[str, Any], ignored: Collection[str] = ()
    ) -> tuple[Fields, dict[str, Any]]:
        """A config.json, judged, and the fields of our `model` section.

        Args:
            values: as in the file.
            ignored: names in it that the user says change nothing.
        """
        fields = Fields(values, self.fields)
        model = self.model(fields)
        fields.finish(model["hybrid_layer_pattern"], ignored)
        return fields, model
