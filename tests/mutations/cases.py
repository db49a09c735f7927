"""What is drawn: a kind of input, a change to it, and a command that meets it.

A case is a pure function of its seed and of the good inputs. Whether a change is *damage*, which no
command may take, is decided by what is on file beside it: a checkpoint has the checksums of its
files; a pair of token files has them too, which `data verify` goes by.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_hybrid.checkpoint.integrity import INTEGRITY_FILE
from megatron_hybrid.checkpoint.saved_here import STAMP_FILE
from tests.mutations.changes import NASTY, change_bytes, change_value
from tests.mutations.good import CONFIG, UPCYCLED, Good, copy, same_result
from tests.mutations.outcome import Found


@dataclass(frozen=True)
class Case:
    """One mutated input and the command that meets it.

    Attributes:
        name: kind and change, in words.
        words: of the command.
        damaged: whether no command may take the input, unless it makes of it what it makes of the
            good one (an export does not read the optimizer's state).
        makes: where it writes, and what it writes there of the good input.
    """

    name: str
    words: list[str]
    damaged: bool = False
    makes: tuple[Path, Path] | None = None

    def fault(self, found: Found) -> str | None:
        """What is wrong with how its command ended; None where it is right."""
        if fault := found.fault():
            return fault
        if found.code or not self.damaged or (self.makes and same_result(*self.makes)):
            return None
        return "took a damaged input"


def draw_case(seed: int, good: Good, folder: Path) -> Case:
    """Prepare the case of a seed in an empty folder."""
    draws = random.Random(seed)
    kinds: tuple[Callable[[random.Random, Good, Path], Case], ...] = (
        _config, _config, _words, _checkpoint, _checkpoint, _pair, _model, _model, _text,
    )  # fmt: skip
    return draws.choice(kinds)(draws, good, folder)


def _config(draws: random.Random, good: Good, folder: Path) -> Case:
    """A config with other values, or with other bytes."""
    value = yaml.safe_load(good.config.read_text())
    path = folder / "run.yaml"
    changes = []
    for _ in range(draws.choice([1, 1, 2, 3])):
        if not isinstance(value, dict) or not value:
            break
        change, value = change_value(value, draws)
        changes.append(change)
    value.setdefault("run_dir", str(folder / "run"))
    if value["run_dir"] == str(good.run):
        value["run_dir"] = str(folder / "run")
    path.write_text(yaml.safe_dump(value))
    if draws.random() < 0.2:
        change, data = change_bytes(path.read_bytes(), draws)
        changes.append(change)
        path.write_bytes(data)
    if str(good.run) in path.read_text(errors="replace"):  # never into the good run
        path.write_text(yaml.safe_dump(CONFIG))
    commands: list[list[Any]] = [
        ["pretrain", path, "--dry-run"],
        ["pretrain", path],
        ["preflight", path],
        ["counts", path],
        ["plan", path, "--gpus", "8"],
        ["data", "plan", path],
        ["submit", path, "--nodes", "1", "--dry-run"],
        ["pretrain", path, "--nproc", "2", "--dry-run"],
    ]  # fmt: skip
    command = draws.choice(commands)
    return Case(f"config: {'; '.join(changes)}", list(map(str, command)))


def _words(draws: random.Random, good: Good, folder: Path) -> Case:
    """A command line with a word replaced, left out, or twice; lists never write into good."""
    out = folder / "out"
    lines: list[list[Any]] = [
        ["generate", good.run, "--prompt", "def ", "--max-new-tokens", "3", "--temperature", "0.5",
         "--top-k", "3", "--top-p", "0.9", "--seed", "1"],
        ["data", "tokenize", "--input", good.text, "--output", out, "--tokenizer-type",
         "huggingface", "--tokenizer-model", good.tokenizer, "--workers", "1",
         "--shuffle-memory-gib", "0.5", "--max-rejected-fraction", "0.1", "--shuffle-seed", "3"],
        ["data", "verify", good.pair, "--vocab-size", "1000", "--tokenizer-type", "null"],
        ["data", "show", good.pair, "0", "1", "--tokens"],
        ["data", "stats", good.pair, "--output", folder / "lengths.png"],
        ["convert", "to-hf", good.run, out, "--dtype", "bf16", "--max-shard-size", "5GB",
         "--threads", "2"],
        ["convert", "from-hf", good.model, out, "--make-vocab-size-divisible-by", "64",
         "--dtype", "fp32"],
        ["upcycle", "--load", good.run, "--save", out, "--experts", "2", "--granularity", "2",
         "--topk", "2", "--layers", "3", "--router-noise", "0.1", "--reinit-fraction", "0.1"],
        ["plan", good.config, "--gpus", "4", "--gpu", "h100", "--context-tokens", "1000",
         "--batch", "2"],
        ["submit", good.config, "--nodes", "2", "--time", "01:00:00", "--array",
         "optimizer.lr=1e-3,2e-3", "--chain", "2", "--option", "--mem=1G", "--dry-run"],
        ["status", good.run, "--json"],
        ["counts", good.config, "model.hidden_size=64"],
        ["preflight", good.config, "--world-size", "4", "--checksum-s", "1", "--timeout-s", "5"],
    ]  # fmt: skip
    line = list(map(str, draws.choice(lines)))
    before = list(line)
    at = draws.randrange(1, len(line))
    kind = draws.choice(["nasty", "nasty", "nasty", "drop", "twice", "other"])
    if kind == "nasty":
        nasty = draws.choice([each for each in NASTY if "\0" not in str(each)])
        if "=" in line[at]:
            line[at] = f"{line[at].partition('=')[0]}={nasty}"
        else:
            line[at] = str(nasty)
    elif kind == "drop":
        del line[at]
    elif kind == "twice":
        line.insert(at, line[at])
    else:
        line[at] = draws.choice(before)
    if line[0] == "submit" and "--dry-run" not in line:
        line.append("--dry-run")
    for writes in ("convert", "data", "upcycle"):
        # Where the word that says where to write has become another, it may be the good input.
        if line[0] == writes and str(out) not in line and not _reads_only(line):
            line.append("--help")
    return Case(f"words: {kind} {at}: {' '.join(line)[:200]}", line)


def _reads_only(line: list[str]) -> bool:
    return line[1] in ("verify", "show")


def _checkpoint(draws: random.Random, good: Good, folder: Path) -> Case:
    """A run in whose checkpoint one file is changed, gone, or another's."""
    run = copy(good.run, folder)
    (saved,) = (run / "checkpoints").glob("iter_*")
    files = sorted(path for path in (run / "checkpoints").rglob("*") if path.is_file())
    path = draws.choice(files)
    change = _change_file(path, files, draws)
    commands: list[list[Any]] = [
        ["pretrain", good.config, f"run_dir={run}", "training.train_iters=2"],
        ["generate", run, "--prompt", "def ", "--max-new-tokens", "2"],
        ["convert", "to-hf", run, folder / "out"],
        ["upcycle", *UPCYCLED, "--load", run, "--save", folder / "out"],
        ["status", run],
    ]  # fmt: skip
    command = draws.choice(commands)
    inside = path.parent == saved
    # A manifest may be written otherwise and say the same.
    same = path.name == INTEGRITY_FILE and _json(path) == _json(good.run / path.relative_to(run))
    # A stamp says whose a checkpoint is, and nothing of what it holds: with another one, or none,
    # it is somebody else's, which anybody may load and the run never removes.
    other = path.name == STAMP_FILE
    damaged = inside and not same and not other and command[0] != "status"
    makes = {"convert": good.model, "upcycle": good.upcycled}.get(command[0])
    return Case(
        f"checkpoint: {path.relative_to(run)}: {change}", list(map(str, command)), damaged,
        (folder / "out", makes) if makes else None,
    )  # fmt: skip


def _pair(draws: random.Random, good: Good, folder: Path) -> Case:
    """A .bin, .idx or facts file that is changed."""
    pair = copy(good.pair, folder)
    files = sorted(folder.glob(f"{pair.name}.*"))
    path = draws.choice(files)
    size = path.stat().st_size
    change = _change_file(path, files, draws)
    commands: list[list[Any]] = [
        ["data", "verify", pair],
        ["data", "verify", pair],
        ["data", "stats", pair, "--output", folder / "lengths.png"],
        ["data", "show", pair, "0", "3", "--tokens"],
        ["pretrain", good.config, f"data.data_path={pair}", f"run_dir={folder / 'run'}"],
        ["preflight", good.config, f"data.data_path={pair}", f"run_dir={folder / 'run'}"],
    ]  # fmt: skip
    command = draws.choice(commands)
    tokens = path.suffix in (".bin", ".idx")
    resized = not path.exists() or path.stat().st_size != size
    looks = command[1] == "verify" or command[0] == "preflight"
    damaged = tokens and (looks or resized)
    return Case(f"pair: {path.name}: {change}", list(map(str, command)), damaged)


def _model(draws: random.Random, good: Good, folder: Path) -> Case:
    """A Hugging Face folder one of whose files is changed; weights cut or gone are damage."""
    model = copy(good.model, folder)
    files = sorted(path for path in model.iterdir() if path.is_file())
    path = draws.choice([*files, model / "config.json", model / "config.json"])
    size = path.stat().st_size
    change = _change_file(path, files, draws)
    command = ["convert", "from-hf", model, folder / "out"]
    weights = path.suffix == ".safetensors"
    damaged = weights and (not path.exists() or path.stat().st_size != size)
    return Case(f"model: {path.name}: {change}", list(map(str, command)), damaged)


def _text(draws: random.Random, good: Good, folder: Path) -> Case:
    """A text or a tokenizer that is changed."""
    text = copy(good.text, folder)
    tokenizer = copy(good.tokenizer, folder)
    files = [text, *sorted(tokenizer.iterdir())]
    path = draws.choice(files)
    change = _change_file(path, files, draws)
    command = [
        "data", "tokenize", "--input", text, "--output", folder / "out", "--workers", "1",
        "--tokenizer-type", "huggingface", "--tokenizer-model", tokenizer,
    ]  # fmt: skip
    return Case(f"text: {path.name}: {change}", list(map(str, command)))


def _change_file(path: Path, files: list[Path], draws: random.Random) -> str:
    """Change one file in place; in words, what was done."""
    before = path.read_bytes()
    kind = draws.choice(["bytes", "bytes", "value", "value", "gone", "other"])
    value = _json(path)
    if kind == "value" and value:
        for _ in range(20):  # a swap of two equal values changes nothing
            change, changed = change_value(value, draws)
            if changed != value:
                break
        path.write_text(json.dumps(changed) if path.suffix == ".json" else yaml.safe_dump(changed))
    elif kind == "gone":
        change = "gone"
        path.unlink()
    elif kind == "other" and (
        others := [each for each in files if each.exists() and each.read_bytes() != before]
    ):
        other = draws.choice(others)
        change = f"{other.name}'s content"
        path.write_bytes(other.read_bytes())
    else:
        change, data = change_bytes(before, draws)
        path.write_bytes(data)
    return change


def _json(path: Path) -> Any:
    """What a JSON or YAML file holds; None where it is neither."""
    try:
        text = path.read_text()
        if path.suffix == ".json":
            return json.loads(text)
        return yaml.safe_load(text) if path.suffix == ".yaml" else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
