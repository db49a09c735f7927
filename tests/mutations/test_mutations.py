"""A few mutated inputs of each kind; many more by hand, with `python -m tests.mutations`."""

from pathlib import Path

import pytest

from tests.mutations.cases import draw_case
from tests.mutations.good import Good, make_good
from tests.mutations.outcome import run

SEEDS = range(24)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    return make_good(tmp_path_factory.mktemp("good") / "inputs")


def test_the_good_inputs_are_taken(good: Good, tmp_path: Path) -> None:
    """Without this, what is refused could be refused for another reason than its change."""
    found = run(["data", "verify", str(good.pair)], tmp_path)
    assert found.code == 0, found.output
    found = run(["convert", "from-hf", str(good.model), str(tmp_path / "out")], tmp_path)
    assert found.code == 0, found.output


@pytest.mark.parametrize("seed", SEEDS)
def test_success_or_one_message(seed: int, good: Good, tmp_path: Path) -> None:
    """No traceback, no hang, no damaged input that is taken."""
    case = draw_case(seed, good, tmp_path)
    found = run(case.words, tmp_path)
    fault = case.fault(found)
    assert fault is None, f"{case.name}: {fault}\n{found.output}"
