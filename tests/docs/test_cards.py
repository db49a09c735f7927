"""Cards: each preset and family has one whose claims can be looked at again; the page is theirs."""

import ast
import importlib.util
from collections.abc import Mapping
from datetime import date
from typing import Any

import pytest

from checkpoints_converter.registry import MODULES
from megatron_hybrid.config import load_config, rules
from megatron_hybrid.config.load import presets
from megatron_hybrid.model.counts import count_parameters
from tests.docs import ROOT


def cards() -> Any:
    """tools/cards.py, as a module."""
    spec = importlib.util.spec_from_file_location("cards", ROOT / "tools" / "cards.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CARDS = cards().read_cards()


def test_all_have_one() -> None:
    """A preset or a family that is added brings its card; the committed page has them all."""
    wanted = [f"preset {name}" for name in presets()] + [f"family {name}" for name in MODULES]
    assert sorted(card["subject"] for card in CARDS) == sorted(wanted)
    committed = (ROOT / "docs" / "cards.md").read_text(encoding="utf-8")
    assert cards().page(CARDS) == committed, "python tools/cards.py > docs/cards.md"


@pytest.mark.parametrize("card", CARDS, ids=[card["subject"] for card in CARDS])
def test_claims(card: Mapping[str, Any]) -> None:
    """The tests that a card names are there, and counts are what the formulas give."""
    assert card["verified"] and card["not_verified"]
    kind, _, name = card["subject"].partition(" ")
    for claim in card["verified"]:
        program, place = claim["command"].split(" ")
        assert program == "pytest"
        file, _, test = place.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert test in tests or not test
        assert date.fromisoformat(claim["date"])
        if kind == "preset" and claim["what"].startswith("parameters"):
            model = load_config([name], which=rules.NO_FILES).model
            assert count_parameters(model).total == claim["number"]
