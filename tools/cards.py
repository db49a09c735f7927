"""Put the cards of presets and converter families into one page: what was verified, and what not.

python tools/cards.py > docs/cards.md

A card is a file of docs/cards: its `subject`; `verified`, each with what, the number that came out,
against what, by which command and when; `not_verified`, each with what and why.
"""

import sys
from pathlib import Path
from typing import Any

from megatron_hybrid.config.yaml_text import parse_yaml

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "cards"
FIELDS = ("what", "number", "against", "command", "date")
_HEAD = """# What was verified

Of each preset and converter family, by which command, against what, when and with which number; and
what was not. Made by `python tools/cards.py > docs/cards.md` from the files of `docs/cards`.
"""


def read_cards() -> list[dict[str, Any]]:
    """All cards: presets first, then families, by name.

    Raises:
        ValueError: a card lacks something, or has more.
    """
    cards = []
    for path in sorted(FOLDER.glob("*.yaml")):
        card = parse_yaml(path.read_text(encoding="utf-8"))
        whole = card.keys() == {"subject", "verified", "not_verified"}
        if (
            not whole
            or any(tuple(each) != FIELDS for each in card["verified"])
            or any(tuple(each) != ("what", "why") for each in card["not_verified"])
        ):
            raise ValueError(f"{path} is not a card: {__doc__}")
        cards.append(card)
    return sorted(cards, key=lambda card: (not card["subject"].startswith("preset "), 0))


def page(cards: list[dict[str, Any]]) -> str:
    """The page, in Markdown."""
    lines = [_HEAD]
    for card in cards:
        kind, _, name = card["subject"].partition(" ")
        lines += [f"## {kind.capitalize()} `{name}`", ""]
        lines += ["| verified | number | against | command | date |", "|---|---|---|---|---|"]
        lines += [
            f"| {each['what']} | {_number(each['number'])} | {each['against']} | "
            f"`{each['command']}` | {each['date']} |"
            for each in card["verified"]
        ]
        lines += ["", "Not verified:", ""]
        lines += [f"- {each['what']}: {each['why']}." for each in card["not_verified"]]
        lines.append("")
    return "\n".join(lines)


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    sys.stdout.write(page(read_cards()))
