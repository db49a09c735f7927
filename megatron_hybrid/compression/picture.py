"""A picture of importance by layer."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from megatron_hybrid.compression.axes import HIDDEN
from megatron_hybrid.compression.scores import DEPTH, Scores
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.layers import layers
from megatron_hybrid.config.pattern import KINDS
from megatron_hybrid.plotting import COLORS, STYLE, save_png, title

_SPREAD = (0.0, 0.1, 0.5, 0.9, 1.0)  # quantiles of a layer's channels
_LEAST = 1e-8  # of a layer that does nothing, on the axis of logarithms
_BESIDE = 0.3


def draw(scores: Scores, model: ModelConfig, path: Path) -> None:
    """Depth, and the spread of the channels and heads of each layer, as a PNG.

    Raises:
        UserError: the file cannot be written.
    """
    every = layers(model)
    kinds = list(dict.fromkeys(layer.kind for layer in every))
    colors = {kind: COLORS[place % len(COLORS)] for place, kind in enumerate(kinds)}
    with plt.rc_context(STYLE):
        figure, (depth, within) = plt.subplots(
            2, 1, figsize=(max(7.0, 0.2 * len(every) + 3), 6.4), dpi=150, layout="constrained"
        )
        for kind in kinds:
            mine = [layer.number for layer in every if layer.kind == kind]
            heights = [max(float(scores.values[DEPTH][n - 1]), _LEAST) for n in mine]
            depth.plot(mine, heights, "o", color=colors[kind], label=KINDS[kind])
        depth.set_yscale("log")
        title(depth, "depth", "1 - cosine of a layer's input and output")
        figure.legend(
            *depth.get_legend_handles_labels(),
            ncols=len(kinds),
            loc="outside lower center",
            frameon=False,
        )
        for layer in every:
            prefix = f"layers.{layer.number}."
            own = [each for name, each in scores.values.items() if name.startswith(prefix)]
            for place, values in enumerate(own):  # experts, and the channels of the shared one
                at = layer.number + _BESIDE * (place - (len(own) - 1) / 2)
                _spread(within, at, values.flatten(), colors[layer.kind])
        _spread(within, 0, scores.values[HIDDEN], "#6b7280")
        title(within, "channels, heads, experts", "of their layer's largest; 0: embedding channels")
        within.set_ylim(0, 1.03)
        within.set_xlabel("layer")
        for axes in (depth, within):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlim(-0.7, len(every) + 0.7)
        save_png(figure, path)
        plt.close(figure)


def _spread(axes: plt.Axes, place: float, values: Tensor, color: str) -> None:
    """Quantiles of one layer's scores: all of them thin, most of them thick, the middle a dot."""
    shares = (values / values.max().clamp(min=1e-30)).double()
    low, tenth, middle, ninth, high = (float(shares.quantile(each)) for each in _SPREAD)
    axes.vlines(place, low, high, color=color, linewidth=1)
    axes.vlines(place, tenth, ninth, color=color, linewidth=4)
    axes.plot(place, middle, "o", color="white", markeredgecolor=color, markersize=4)
