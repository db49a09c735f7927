"""The layer pattern: what it holds, what the engine gets of it, what is wrong with it."""

import pytest

from megatron_hybrid.config.pattern import parse_pattern, pattern_problems


def test_kinds_and_segments() -> None:
    """Symbols are counted without the bars."""
    pattern = parse_pattern("M-M*|ME")
    assert pattern.segments == ("M-M*", "ME")
    assert pattern.layers == "M-M*ME"
    assert pattern.num_layers == 6
    assert [pattern.count(symbol) for symbol in "M*-E"] == [3, 1, 1, 1]
    assert pattern.has("E") and not parse_pattern("M-").has("E")


def test_parallel_heads_have_attention_and_mamba() -> None:
    """They count as neither, have both, and stand as attention towards the engine."""
    pattern = parse_pattern("H-|HE")
    assert [pattern.count(symbol) for symbol in "M*-EH"] == [0, 0, 1, 1, 2]
    assert [pattern.has(kind) for kind in "M*-EH"] == [True] * 5
    assert not parse_pattern("M*").has("H")
    assert pattern.engine_text(2) == "*-|*E"


def test_the_engine_gets_bars_only_with_stages() -> None:
    """One stage must hold all layers, and the engine would take the first segment for them."""
    pattern = parse_pattern("M-|M*")
    assert (pattern.engine_text(1), pattern.engine_text(2)) == ("M-M*", "M-|M*")


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("Mx-", ["symbol 2, 'x', is not a layer", "'M' (Mamba)"]),
        ("MD", ["symbol 2, 'D' (sparse attention), is not supported"]),
        ("", ["it has no layer"]),
        ("M||M", ["pipeline segment 2 of 3 is empty"]),
    ],
)
def test_problems(text: str, fragments: list[str]) -> None:
    """Position, symbol and what is allowed."""
    [problem] = pattern_problems(text)
    assert all(fragment in problem for fragment in fragments)
    with pytest.raises(ValueError, match="pattern"):
        parse_pattern(text)


def test_every_wrong_symbol_is_reported() -> None:
    """Not only the first."""
    assert len(pattern_problems("MxDy|")) == 4
