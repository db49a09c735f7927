"""Which releases of transformers compute an exported folder as we compute the model.

A folder cannot say it: config.json has no field for what a release does.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from packaging.version import InvalidVersion, Version

from checkpoints_converter.family import Family
from checkpoints_converter.fields import Fields
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.pattern import MAMBA, parse_pattern

# 5.8.0 to 5.14.1 compute Mamba-2 wrongly beyond one chunk (transformers' issue 47246); before them
# there was no nemotron_h.
OLDEST_TRANSFORMERS = Version("5.15.1")


class Floor(NamedTuple):
    """The oldest release that is right, and what is wrong with those before."""

    version: Version
    why: str


def floor(family: Family, model: ModelConfig) -> Floor:
    """The oldest release that computes a model of a family as we do."""
    since = family.grouped_norm_since
    has_mamba = parse_pattern(model.hybrid_layer_pattern).has(MAMBA)
    if since is not None and has_mamba and model.mamba_num_groups > 1:
        return Floor(
            Version(since),
            "earlier ones apply the gated norm of Mamba-2 over its whole width, and not to each of "
            f"the {model.mamba_num_groups} groups of this model: other logits altogether",
        )
    return Floor(
        OLDEST_TRANSFORMERS,
        "earlier ones compute Mamba-2 wrongly for sequences longer than one chunk",
    )


def problem(found: str, family: Family, model: ModelConfig) -> str | None:
    """Why a release is not right for a model; None where it is."""
    oldest, why = floor(family, model)
    if Version(found) >= oldest:
        return None
    return f"transformers {found} is installed; this model needs {oldest} or later: {why}"


def problem_here(family: Family, model: ModelConfig) -> str | None:
    """As `problem`, of the release that is installed; None where there is none."""
    try:
        return problem(version("transformers"), family, model)
    except PackageNotFoundError:
        return None


def note_writer(family: Family, fields: Fields, groups: int) -> None:
    """Say that the release which wrote a folder computed something else than we do.

    Args:
        groups: `mamba_num_groups`, 1 for a model without Mamba-2.
    """
    said, since = fields["transformers_version"], family.grouped_norm_since
    if said is None or since is None or groups == 1:
        return
    try:
        older = Version(said) < Version(since)
    except InvalidVersion:
        return
    if older:
        fields.notes.append(
            f"transformers {said}, which wrote it, applied the gated norm over the whole width; "
            f"here it is applied to each of {groups} groups, as in mamba-ssm and in transformers "
            f"from {since} on"
        )
