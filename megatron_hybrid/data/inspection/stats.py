"""How long the documents of indexed files are: a table, and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.index import Index
from megatron_hybrid.data.inspection.lengths import Lengths
from megatron_hybrid.data.shard import open_shard

_ALL = "all"
_QUANTILES = {"5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "99 %": 0.99}


def read_lengths(prefixes: Sequence[Path]) -> dict[str, Lengths]:
    """The lengths of each prefix, and of all together, as "all", where there are several.

    Raises:
        DataError: lists every pair that cannot be opened or has no documents.
    """
    found, problems = {}, []
    for prefix in prefixes:
        try:
            found[str(prefix)] = _lengths(prefix)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    if len(found) > 1:
        together = Lengths()
        for lengths in found.values():
            together.merge(lengths)
        found[_ALL] = together
    return found


def _lengths(prefix: Path) -> Lengths:
    open_shard(prefix)
    index, lengths = Index(prefix), Lengths()
    for block in index.lengths():
        if block.min() < 0:
            raise DataError(
                f"{index.path} is damaged: a document has {block.min()} tokens; "
                "`megatron-hybrid data verify` says where"
            )
        lengths.add(block)
    if not lengths.documents:
        raise DataError(f"{index.path} describes no document")
    return lengths


def lengths_table(lengths: Mapping[str, Lengths]) -> Table:
    """A row for each of `read_lengths`, all lengths in tokens."""
    table = Table("", title="Document lengths in tokens")
    for name in ("documents", "tokens", "mean", *_QUANTILES, "longest"):
        table.add_column(name, justify="right")
    for name, each in lengths.items():
        if name == _ALL:
            table.add_section()
        quantiles = [f"{each.quantile(fraction):,}" for fraction in (*_QUANTILES.values(), 1.0)]
        table.add_row(
            name, f"{each.documents:,}", f"{each.tokens:,}", f"{each.mean:,.1f}", *quantiles
        )
    return table
