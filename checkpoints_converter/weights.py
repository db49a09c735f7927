"""How our tensors and a family's lie in each other: the kinds of mapping that its table is made of.

Every kind comes down to runs of rows: rows of one of our tensors *are* rows of one of theirs. So a
table written once is read in both directions, and any row of a result can be made without the rest.
"Rows" are those of a tensor as a matrix (`checkpoint.reader.as_matrix`): `[E, f, h]` has E*f rows.

Ours are the whole tensors of a distributed checkpoint, which know nothing of ranks; theirs are
those of a safetensors folder.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from checkpoints_converter.errors import ConversionError
from megatron_hybrid.checkpoint.reader import as_matrix

Shape = tuple[int, ...]
_SHOWN = 20  # problems in one error


@dataclass(frozen=True)
class Spec:
    """A tensor on one side.

    Attributes:
        fp32: stays fp32 when everything else is cast.
        zero_rows: rows at its end that the other side has not: zeros when the tensor is made, and
            left out when it is read.
    """

    name: str
    shape: Shape
    fp32: bool = False
    zero_rows: int = 0


@dataclass(frozen=True)
class Run:
    """`count` rows of our tensor from `our_row` on are those of theirs from `their_row` on."""

    ours: str
    our_row: int
    theirs: str
    their_row: int
    count: int


@dataclass(frozen=True)
class Mapping:
    """Tensors of ours that hold the same rows as some of theirs."""

    ours: tuple[Spec, ...]
    theirs: tuple[Spec, ...]
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Names:
    """The names on one side. Some tensors go by several, of which a file has one.

    Attributes:
        present: names in the files; None when they are being made, and the first choice counts.
    """

    present: Collection[str] | None = None

    def has(self, name: str) -> bool:
        """Whether the files have a tensor."""
        return self.present is not None and name in self.present

    def pick(self, *candidates: str) -> str:
        """The candidate that is there; the first where none is, or where files are being made."""
        return next((name for name in candidates if self.has(name)), candidates[0])


def renamed(ours: str, theirs: str, shape: Sequence[int], *, fp32: bool = False) -> Mapping:
    """The same tensor under two names."""
    shape = tuple(shape)
    run = Run(ours, 0, theirs, 0, as_matrix(shape)[0])
    return Mapping((Spec(ours, shape, fp32),), (Spec(theirs, shape, fp32),), (run,))


def concatenated(ours: Sequence[tuple[str, Shape]], theirs: str) -> Mapping:
    """Several of ours are stacked along dim 0 in one of theirs (a packed Mamba projection)."""
    runs = tuple(Run(name, 0, theirs, row, count) for name, row, count in _stack(ours))
    specs = tuple(Spec(name, shape) for name, shape in ours)
    return Mapping(specs, (Spec(theirs, _stacked_shape(ours)),), runs)


def split(ours: str, theirs: Sequence[tuple[str, Shape]]) -> Mapping:
    """Several of theirs are stacked along dim 0 in one of ours (gate and up of a gated MLP)."""
    runs = tuple(Run(ours, row, name, 0, count) for name, row, count in _stack(theirs))
    specs = tuple(Spec(name, shape) for name, shape in theirs)
    return Mapping((Spec(ours, _stacked_shape(theirs)),), specs, runs)


def qkv_interleaved(
    ours: str, q: str, k: str, v: str, *, heads: int, groups: int, head_dim: int, width: Shape
) -> Mapping:
    """Ours holds, for each key/value group, its query heads, its key and its value.

    Args:
        ours: `[(heads + 2 * groups) * head_dim, *width]`.
        q, k, v: `[heads * head_dim, *width]`, `[groups * head_dim, *width]` twice.
        width: `(hidden_size,)` of the weight, `()` of a bias.
    """
    queries = heads // groups * head_dim
    runs = []
    for group in range(groups):
        row = group * (queries + 2 * head_dim)
        runs += [
            Run(ours, row, q, group * queries, queries),
            Run(ours, row + queries, k, group * head_dim, head_dim),
            Run(ours, row + queries + head_dim, v, group * head_dim, head_dim),
        ]
    whole = Spec(ours, ((heads + 2 * groups) * head_dim, *width))
    theirs = (
        Spec(q, (heads * head_dim, *width)),
        Spec(k, (groups * head_dim, *width)),
        Spec(v, (groups * head_dim, *width)),
    )
    return Mapping((whole,), theirs, tuple(runs))


def per_expert(
    ours: str | Sequence[str], theirs: str | Sequence[str], experts: int, shape: tuple[int, int]
) -> Mapping:
    """The same matrix of every expert.

    Args:
        ours, theirs: one name for all experts stacked, `[experts, *shape]`, or one for each.
        shape: of one expert's matrix.
    """
    our_specs, our_places = _experts(ours, experts, shape)
    their_specs, their_places = _experts(theirs, experts, shape)
    runs = [
        Run(our_name, our_row, their_name, their_row, shape[0])
        for (our_name, our_row), (their_name, their_row) in zip(
            our_places, their_places, strict=True
        )
    ]
    return Mapping(our_specs, their_specs, tuple(runs))


def padded_vocabulary(
    ours: str, theirs: Sequence[str], *, vocab_size: int, padded: int, hidden_size: int
) -> Mapping:
    """Rows of the vocabulary: ours has more, which are cut off, and zeros in the other direction.

    Args:
        theirs: one name, or two alike where our embedding is the output layer, too, and theirs is
            not.
    """
    our = Spec(ours, (padded, hidden_size), zero_rows=padded - vocab_size)
    specs = tuple(Spec(name, (vocab_size, hidden_size)) for name in theirs)
    return Mapping((our,), specs, tuple(Run(ours, 0, name, 0, vocab_size) for name in theirs))


def always_zero(theirs: str, shape: Sequence[int], *, fp32: bool = False) -> Mapping:
    """A tensor of theirs that ours has no need of, being zero."""
    shape = tuple(shape)
    return Mapping((), (Spec(theirs, shape, fp32, zero_rows=as_matrix(shape)[0]),), ())


@dataclass(frozen=True)
class Piece:
    """`count` rows of a tensor being made, from its row `row` on, and where they are read."""

    row: int
    source: str
    source_row: int
    count: int


@dataclass(frozen=True)
class Recipe:
    """How to make one tensor: its pieces in the order of their rows; its last rows may be zeros."""

    spec: Spec
    pieces: tuple[Piece, ...]


def recipes_of_theirs(table: Iterable[Mapping]) -> list[Recipe]:
    """How to make every tensor of theirs from ours, in the order of the table."""
    pieces: dict[str, list[Piece]] = {}
    table = list(table)
    for run in (run for mapping in table for run in mapping.runs):
        piece = Piece(run.their_row, run.ours, run.our_row, run.count)
        pieces.setdefault(run.theirs, []).append(piece)
    return _recipes((spec for mapping in table for spec in mapping.theirs), pieces)


def recipes_of_ours(table: Iterable[Mapping]) -> list[Recipe]:
    """How to make every tensor of ours from theirs, in the order of the table.

    Rows that theirs hold several times are read where they are held first (`held_twice`).
    """
    pieces: dict[str, list[Piece]] = {}
    table = list(table)
    for run, _ in _runs_of_ours(table):
        piece = Piece(run.our_row, run.theirs, run.their_row, run.count)
        pieces.setdefault(run.ours, []).append(piece)
    return _recipes((spec for mapping in table for spec in mapping.ours), pieces)


def held_twice(table: Iterable[Mapping]) -> list[tuple[Run, Run]]:
    """Rows of ours that theirs hold more than once, and must hold alike: both places of each."""
    return [(run, again) for run, others in _runs_of_ours(table) for again in others]


def _runs_of_ours(table: Iterable[Mapping]) -> list[tuple[Run, list[Run]]]:
    """The first run of every rows of ours, and those of the same rows."""
    found: dict[tuple[str, int, int], tuple[Run, list[Run]]] = {}
    for run in (run for mapping in table for run in mapping.runs):
        rows = (run.ours, run.our_row, run.count)
        if rows in found:
            found[rows][1].append(run)
        else:
            found[rows] = (run, [])
    return list(found.values())


def _recipes(specs: Iterable[Spec], pieces: dict[str, list[Piece]]) -> list[Recipe]:
    """A recipe for each tensor, in which every row is accounted for once."""
    recipes = []
    for spec in specs:
        ordered = sorted(pieces.pop(spec.name, []), key=lambda piece: piece.row)
        row = 0
        for piece in ordered:
            assert piece.row == row, f"{spec} has its row {row} from nowhere, or twice"
            row += piece.count
        assert row + spec.zero_rows == as_matrix(spec.shape)[0], spec
        recipes.append(Recipe(spec, tuple(ordered)))
    assert not pieces, f"mapped, but not in the table, or twice: {sorted(pieces)}"
    return recipes


def refuse_other_tensors(what: str, specs: Iterable[Spec], present: dict[str, Shape]) -> None:
    """Refuse files whose tensors are not those of a table.

    Args:
        what: begins the error's text.
        present: shapes of the tensors that are there, by name.

    Raises:
        ConversionError: every tensor that is missing, of another shape, or unknown.
    """
    expected = {spec.name: spec.shape for spec in specs}
    problems = [f"{name} is missing" for name in expected if name not in present]
    problems += [
        f"{name} has the shape {present[name]}; it must be {shape}"
        for name, shape in expected.items()
        if name in present and present[name] != shape
    ]
    problems += [
        f"{name} {shape} has no place in the model"
        for name, shape in present.items()
        if name not in expected
    ]
    if problems:
        shown = [f"  - {problem}" for problem in problems[:_SHOWN]]
        if len(problems) > _SHOWN:
            shown.append(f"  ... and {len(problems) - _SHOWN} more")
        raise ConversionError("\n".join([what, *shown]))


def _stack(parts: Sequence[tuple[str, Shape]]) -> list[tuple[str, int, int]]:
    """(name, first row in the whole, rows) of parts stacked along dim 0."""
    places, row = [], 0
    for name, shape in parts:
        count = as_matrix(shape)[0]
        places.append((name, row, count))
        row += count
    return places


def _stacked_shape(parts: Sequence[tuple[str, Shape]]) -> Shape:
    return (sum(shape[0] for _, shape in parts), *parts[0][1][1:])


def _experts(
    names: str | Sequence[str], experts: int, shape: tuple[int, int]
) -> tuple[tuple[Spec, ...], list[tuple[str, int]]]:
    """The tensors that hold the experts' matrices, and where each expert's begins."""
    if isinstance(names, str):
        specs: tuple[Spec, ...] = (Spec(names, (experts, *shape)),)
        return specs, [(names, expert * shape[0]) for expert in range(experts)]
    assert len(names) == experts
    return tuple(Spec(name, shape) for name in names), [(name, 0) for name in names]
