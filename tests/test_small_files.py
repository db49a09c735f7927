"""Whatever is wrong with a small file is said with its name, by one mechanism."""

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import megatron_hybrid
from megatron_hybrid.errors import UserError
from megatron_hybrid.json_text import parse_json
from megatron_hybrid.small_files import naming, read_json

TREE = Path(megatron_hybrid.__file__).parent.parent
# Who else parses, and why it is not a file of which a message would have to give the name.
PARSERS = {
    "checkpoints_converter/carried_files.py": "a file that nothing depends on",
    "checkpoints_converter/inspection.py": "a config, within naming()",
    "checkpoints_converter/output_folder.py": "an older list: damaged counts as none",
    "checkpoints_converter/safetensors_files.py": "a file's header, which it names",
    "launchers/errors.py": "what a dying rank left: damaged counts as nothing",
    "megatron_hybrid/checkpoint/carried.py": "a file that a run carries, which it names",
    "megatron_hybrid/claim.py": "half a claim is one of somebody",
    "megatron_hybrid/config/flags.py": "words of a command line",
    "megatron_hybrid/config/load.py": "a YAML file, which it names; presets",
    "megatron_hybrid/data/chat/conversation.py": "text in a line of a conversation",
    "megatron_hybrid/data/plan.py": "text; saved_plan has the file",
    "megatron_hybrid/data/saved_plan.py": "text that it made",
    "megatron_hybrid/data/tokenizer/fast.py": "text that tokenizers has read",
    "megatron_hybrid/data/tokenizer/hugging_face.py": "a tokenizer's config, which it names",
    "megatron_hybrid/data/tokenizing/records.py": "lines of documents",
    "megatron_hybrid/generation/batch_file.py": "lines of requests and answers, which it names",
    "megatron_hybrid/generation/serving/connection.py": "the body of a request",
    "megatron_hybrid/json_text.py": "text; whoever calls it has the file",
    "megatron_hybrid/planner/costs.py": "--costs, which it names",
    "megatron_hybrid/planner/published.py": "a file of this package",
    "megatron_hybrid/platform/imports.py": "a process's output",
    "megatron_hybrid/preflight/nodes.py": "from a store",
    "megatron_hybrid/small_files.py": "the mechanism",
    "megatron_hybrid/smoke/facts.py": "a process's output",
    "megatron_hybrid/teachers/cache_spec.py": "text that a plan made",
    "megatron_hybrid/training/trackers/follow.py": "a line of the process that started it",
    "megatron_hybrid/training/trackers/rows.py": "lines of metrics, within naming()",
    "megatron_hybrid/training/attempts.py": "lines: half a one is passed over",
    "megatron_hybrid/training/metrics.py": "lines, which it names",
    "megatron_hybrid/training/callbacks/watchdog.py": "reports of ranks: a damaged one is none",
    "tools/cards.py": "cards of this repository",
    "tools/inspect_checkpoint.py": "text that a plan made",
}


def test_nobody_else_reads_small_files() -> None:
    """A new place that parses JSON or YAML goes through `small_files`, or says here why not."""
    found = set()
    for package in ("megatron_hybrid", "checkpoints_converter", "launchers", "tools"):
        for path in (TREE / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                    "json.loads", "json.load", "parse_json",
                    "orjson.loads", "parse_yaml", "yaml.safe_load",
                ):  # fmt: skip
                    found.add(str(path.relative_to(TREE)))
    assert found == PARSERS.keys()


@dataclass
class _Record:
    first: int
    second: int


@pytest.mark.parametrize(
    ("stumble", "said"),
    [
        (lambda: {}["crc32"], "'crc32' is missing"),
        (lambda: _Record(first=1, other=2), "unknown field other"),
        (lambda: _Record(first=1), "'second' is missing"),
        (lambda: parse_json("3")["key"], "a value is of another type or size"),
        (lambda: parse_json("[]")[3], "a value is of another type or size"),
        (lambda: parse_json("3").items(), "a value is of another type or size"),
        (lambda: int("x"), "invalid literal"),
    ],
)
def test_what_python_stumbles_over_is_said_in_words(
    stumble: Callable[[], object], said: str
) -> None:
    """With the file's name, and without the name of a Python error."""
    expected = re.escape(f"facts.json is damaged: {said}")
    with pytest.raises(UserError, match=expected) as caught, naming(Path("facts.json")):
        stumble()
    assert "Error" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is damaged: not JSON .Expecting value"),
        (b'{"a": 1', "is damaged: not JSON .Expecting"),
        (b"\xff\xfe\x00", "is damaged: not JSON"),
        (b"[1, 2]", r"is damaged: it must hold a JSON object, and holds \[1, 2\]"),
        (b'{"a": 1, "z": 2, "y": 3}', "is damaged: unknown field y, z; allowed: a, b"),
        (b"[" * 100_000, "is damaged: not JSON .its brackets are nested"),
        (None, "cannot be read: No such file"),
    ],
)
def test_json(tmp_path: Path, content: bytes | None, problem: str) -> None:
    """Half a file, another kind, an unknown field, none at all: the file and what is wrong."""
    path = tmp_path / "small.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path} {problem}"):
        read_json(path, fields=("a", "b"))
    path.write_text(json.dumps({"a": 1}))
    assert read_json(path, fields=("a", "b")) == {"a": 1}


def test_stumbling_readers(tmp_path: Path) -> None:
    """However the reader of a content stumbles, the file is named, once."""
    for stumble in ("{}['plan']", "[][0]", "None.x", "1 / 0", "int('x')", "open('/x/y')"):
        match = f"^{tmp_path} (is damaged|cannot be read): ."
        with pytest.raises(UserError, match=match) as error, naming(tmp_path), naming(tmp_path):
            eval(stumble)
        assert str(error.value).count(str(tmp_path)) == 1
