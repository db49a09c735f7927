"""The documentation: where the pages are, and the blocks of code in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LANGUAGES = {"bash", "python", "yaml", "text"}
_NOTE = re.compile(r"<!-- (not run|run with): (.+) -->")
_FENCE = re.compile(r" *```(.*)")


@dataclass(frozen=True)
class Block:
    """A block of code in a page.

    Attributes:
        page: relative to the root.
        line: where it begins.
        not_run: why its commands are only read; "": they are run.
        run_with: words that a test adds to each `pretrain`, to keep it small.
    """

    page: str
    line: int
    language: str
    text: str
    not_run: str
    run_with: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Every page, first the one to start with."""
    found = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    found += sorted((ROOT / "docs").glob("*.md"))
    return found + sorted(ROOT.glob("[be]*/**/README.md"))


def blocks(page: Path) -> list[Block]:
    """Its blocks of code, with the comment before each that says how a test takes it."""
    found: list[Block] = []
    inside: list[str] | None = None
    note = language = ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.fullmatch(line)
        if inside is None and fence:
            start, inside, language = number, [], fence[1]
        elif inside is not None and fence:
            said = _NOTE.fullmatch(note)
            kind, words = (said[1], said[2]) if said else ("", "")
            texts = [words if kind == each else "" for each in ("not run", "run with")]
            name = str(page.relative_to(ROOT))
            found.append(Block(name, start, language, "\n".join(inside), *texts))
            inside, note = None, ""
        elif inside is not None:
            inside.append(line)
        else:
            note = line
    assert inside is None, f"{page}: a block without an end"
    return found
