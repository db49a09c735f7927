"""The picture of a plan: areas that are the shares, whatever the number of sources and phases."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from megatron_hybrid.config.phases import Phase, normalised
from megatron_hybrid.data.layout import make_plan
from megatron_hybrid.data.plan import Plan
from megatron_hybrid.data.plan_picture import draw_plan
from megatron_hybrid.plotting import COLORS
from tests.data.planning import source


def plan_of(blends: Sequence[dict[str, float]], ends: Sequence[int]) -> Plan:
    """A plan over sources of 100,000 tokens, of sequences of 10 tokens in batches of 10."""
    names = sorted({name for blend in blends for name in blend})
    phases = [
        Phase(f"phase-{n}", start, end, normalised(blend), 10)
        for n, (blend, start, end) in enumerate(zip(blends, [0, *ends], ends, strict=False))
    ]
    return make_plan(phases, [source(name, 100_001, 10) for name in names], [(0, 10)], 1)


def pixels(path: Path, color: str) -> np.ndarray:
    """Where the picture has exactly this colour: `[height, width]` bool."""
    image = (imread(path)[:, :, :3] * 255).round().astype(int)
    wanted = (np.array(to_rgb(color)) * 255).round().astype(int)
    return np.asarray((image == wanted).all(axis=2))


def test_areas_are_shares(tmp_path: Path) -> None:
    """Of two phases of equal length, one half web: web's colour fills 3/4, code's 1/4."""
    path = tmp_path / "plan.png"
    draw_plan(plan_of([{"web": 1}, {"web": 1, "code": 1}], [50_000, 100_000]), path, "run")
    upper = slice(0, 780)  # without the panel of epochs
    web, code = (pixels(path, color)[upper] for color in COLORS[:2])
    assert web.sum() / code.sum() == pytest.approx(3, rel=0.03)
    panel = web[:, :1300]
    left, right = np.nonzero(panel.any(axis=0))[0][[0, -1]]
    middle = (left + right) // 2
    heights = panel.sum(axis=0)
    assert heights[left + 50] == pytest.approx(2 * heights[right - 50], rel=0.03)
    changes = np.nonzero(np.abs(np.diff(heights)) > 100)[0]
    assert np.abs(changes - middle).min() < 8  # the phases meet where half the tokens are read


def test_many_sources_and_phases(tmp_path: Path) -> None:
    """The largest sources have colours of their own; 60 small ones share one, and are counted."""
    path = tmp_path / "plan.png"
    blend = {f"s{number:02}": 1000 / (number + 1) ** 2 for number in range(80)}
    ends = [10_000 * (number + 1) for number in range(9)]
    draw_plan(plan_of([blend] * 9, ends), path)
    assert all(pixels(path, color).any() for color in COLORS)
    assert pixels(path, "#d1d5db").sum() > 1000  # the others
    taller = imread(path).shape[0]
    draw_plan(plan_of([{"web": 1}], [10_000]), path)
    assert taller > imread(path).shape[0]


def test_where_the_run_goes_on(tmp_path: Path) -> None:
    """A line marks how far the plan has been read."""
    plan = plan_of([{"web": 1}], [100_000])
    dark = []
    for consumed in (0, 5_000):
        draw_plan(plan, tmp_path / "plan.png", consumed_samples=consumed)
        columns = pixels(tmp_path / "plan.png", "#1f2937")[:780, :1300].sum(axis=0)
        dark.append(int(columns.max()))
    assert dark[1] > 400 > dark[0]
