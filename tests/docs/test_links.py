"""Links and anchors of every page lead somewhere."""

import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs import ROOT, pages

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@cache
def prose(page: Path) -> str:
    """A page without its code."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"))
    return re.sub(r"`[^`\n]*`", lambda found: "" if "](" in found[0] else found[0], text)


@cache
def anchors(page: Path) -> set[str]:
    """What GitHub makes of its headings."""
    found: set[str] = set()
    for title in re.findall(r"(?m)^#+ (.+)$", prose(page)):
        slug = re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


def problems(page: Path, root: Path = ROOT) -> list[str]:
    """The links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue  # what is on the network is not asked for
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page.resolve()
        if not target.is_relative_to(root.resolve()) or not target.exists():
            found.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target):
            found.append(f"{link}: no such heading; there are {sorted(anchors(target))}")
    return found


@pytest.mark.parametrize("page", pages(), ids=[str(page.relative_to(ROOT)) for page in pages()])
def test_links_lead_somewhere(page: Path) -> None:
    """Files and headings, pictures too."""
    assert problems(page) == []


def test_every_page_is_linked() -> None:
    """From the README, on one step or two."""
    seen = {(ROOT / "README.md").resolve()}
    for _ in range(2):
        for page in list(seen):
            links = [link.partition("#")[0] for link in LINK.findall(prose(page))]
            seen |= {(page.parent / link).resolve() for link in links if link.endswith(".md")}
    assert {page.resolve() for page in pages()} <= seen


def test_files_that_code_and_messages_name_are_there() -> None:
    """Pages of docs by their path, in what users read of the program and its scripts."""
    folders = ("megatron_hybrid", "launchers", "checkpoints_converter", "tools", "slurm", "docker")
    files = [path for each in folders for path in (ROOT / each).rglob("*") if path.is_file()]
    named = {
        (path, name)
        for path in [*files, ROOT / "setup.py", ROOT / "tests" / "gpu" / "check.sh"]
        if path.suffix in (".py", ".sh", ".sbatch", ".txt")
        for name in re.findall(r"(?<![\w/])docs/[\w.]+\.(?:md|png)", path.read_text("utf-8"))
    }
    assert {name for _, name in named} >= {"docs/planner.md", "docs/numerics.md"}
    assert [(path, name) for path, name in named if not (ROOT / name).exists()] == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    """A file, and a heading, that there is not; links in code are none."""
    page = ROOT / "docs" / "numerics.md"
    assert {"documents", "one-seed-on-two-backends"} <= anchors(page)
    broken = tmp_path / "page.md"
    broken.write_text("# Head\n[a](no.md) [b](#head) [c](#no) [d](https://x.y)\n```\n[e](f)\n```\n")
    assert [text.partition(":")[0] for text in problems(broken, tmp_path)] == ["no.md", "#no"]
