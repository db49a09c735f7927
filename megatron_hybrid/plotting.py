"""How the pictures of this project look: one set of colours, one kind of axis and of heading."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import write_atomic

INK, PALE_INK, GRID = "#1f2937", "#6b7280", "#e5e7eb"
COLORS = ("#2563eb", "#db2777", "#059669", "#d97706", "#7c3aed", "#0891b2", "#dc2626", "#4d7c0f")
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": PALE_INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": PALE_INK,
    "ytick.color": PALE_INK,
    "lines.solid_capstyle": "round",
}
_PNG = b"\x89PNG\r\n\x1a\n"
_UNITS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))


def title(axes: Axes, name: str, note: str, pad: float = 9) -> None:
    """A panel's name above its left end, and beside it, in pale, what its values are."""
    text = axes.set_title(name, loc="left", fontsize=11.5, fontweight="bold", pad=pad)
    axes.annotate(
        note, (1, 0), xytext=(8, 3), textcoords="offset points", xycoords=text,
        color=PALE_INK, annotation_clip=False,
    )  # fmt: skip


def token_axis(panels: Sequence[Axes], end_tokens: float) -> None:
    """Training tokens from 0 along the x axis, in thousands, millions, billions or trillions."""
    scale, unit = next((pair for pair in _UNITS if end_tokens >= pair[0]), (1.0, ""))
    for axes in panels:
        axes.set_xlim(0, end_tokens)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens / scale:g}"))
        axes.set_xlabel(f"{unit} of training tokens" if unit else "training tokens")
        axes.tick_params(length=3)


def _is_other_file(path: Path) -> bool:
    """Whether a picture would take the place of something else, as of a config."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        beginning = file.read(len(_PNG))
    return beginning not in (b"", _PNG)


def save_png(figure: Figure, path: Path) -> None:
    """Write a picture whole, in a folder that is made if it is not there.

    Raises:
        UserError: there is a folder of that name, or a file that is no picture.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the picture in it, such as {path / 'plot.png'}")
    if _is_other_file(path):
        raise UserError(
            f"{path} is there, and no PNG: it is not written over; name another file, such as "
            f"{path.with_suffix('.png')}"
        )
    image = io.BytesIO()
    figure.savefig(image, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, image.getvalue())
