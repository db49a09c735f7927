"""What Slurm and its scripts read from text, each in its own language, said and refused here.

A directive is a line `#SBATCH --name="value"` before the first command of a batch script; quotes
and backslashes in it are sbatch's own, nearly a shell's.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_hybrid.bounds import MOST_SECONDS
from megatron_hybrid.errors import UserError

# A longer value is cut off or worse (sbatch reads a word into a buffer of 8192 bytes).
_MAX_BYTES = 8000
_SHORT = {
    "A": "account", "a": "array", "b": "begin", "B": "extra-node-info", "C": "constraint",
    "c": "cpus-per-task", "D": "chdir", "d": "dependency", "e": "error", "F": "nodefile",
    "G": "gpus", "i": "input", "J": "job-name", "L": "licenses", "M": "clusters",
    "m": "distribution", "N": "nodes", "n": "ntasks", "o": "output", "p": "partition", "q": "qos",
    "S": "core-spec", "t": "time", "w": "nodelist", "x": "exclude",
}  # fmt: skip
_SHORT_SWITCHES = {
    "H": "hold", "k": "no-kill", "O": "overcommit", "Q": "quiet", "s": "oversubscribe",
    "v": "verbose", "W": "wait",
}  # fmt: skip
_UNITS = {"D": 86400, "H": 3600, "M": 60, "S": 1}
# As sbatch's manual has them. Without a unit it is minutes.
_TIMES = (
    r"(?P<M>\d+)", r"(?P<M>\d+):(?P<S>\d+)", r"(?P<H>\d+):(?P<M>\d+):(?P<S>\d+)",
    r"(?P<D>\d+)-(?P<H>\d+)", r"(?P<D>\d+)-(?P<H>\d+):(?P<M>\d+)",
    r"(?P<D>\d+)-(?P<H>\d+):(?P<M>\d+):(?P<S>\d+)",
)  # fmt: skip
_NOTICE_S = 60  # of a signal without a time


@dataclass(frozen=True)
class Option:
    """An option in a batch script.

    Attributes:
        line: number of its line, from 0.
        name: the long one, without dashes.
        value: "" for a switch.
        alone: whether its line has no other.
    """

    line: int
    name: str
    value: str
    alone: bool


def directive(name: str, value: str) -> str:
    """The line of a batch script that says `--name=value`, or `--name` where the value is empty.

    Raises:
        UserError: the value has what no such line can say.
    """
    said = f"--{name}={value!r}"
    if bad := next((char for char in value if not (char.isprintable() or char in " \t")), None):
        raise UserError(f"{said} cannot be said to Slurm; allowed: text without {bad!r}")
    if len(value.encode()) > _MAX_BYTES:
        raise UserError(f"{said:.60}... cannot be said to Slurm; allowed: {_MAX_BYTES} bytes")
    if re.fullmatch(r"[\w%@:./,+=~^\[\]-]*", value):
        return f"#SBATCH --{name}" + (f"={value}" if value else "")
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{name}="{quoted}"'


def file_pattern(path: str) -> str:
    """The pattern of the file name that is this path, to the letter.

    Raises:
        UserError: it has a backslash, with which Slurm reads a pattern as no pattern.
    """
    if "\\" in path:
        raise UserError(
            f"the job's output cannot be put into {path!r}: to Slurm a backslash there means "
            "something else; allowed: a run_dir without one"
        )
    return path.replace("%", "%%")


def module_path(path: str) -> str:
    """The PYTHONPATH that has this folder.

    Raises:
        UserError: it has a colon, which parts two folders there.
    """
    if ":" in path:
        raise UserError(
            f"the code cannot be kept in {path!r}: PYTHONPATH parts folders at ':'; allowed: a "
            "run_dir without one"
        )
    return path


def duration_s(text: str) -> float:
    """The seconds of a time limit as Slurm takes it, in whole minutes; inf: none, as 0 is to Slurm.

    Raises:
        UserError: it is no time limit, or longer than Slurm can count.
    """
    if text.upper() in ("UNLIMITED", "INFINITE", "-1"):
        return float("inf")
    for form in _TIMES:
        if match := re.fullmatch(form, text, re.ASCII):
            seconds = sum(int(number) * _UNITS[unit] for unit, number in match.groupdict().items())
            if seconds > MOST_SECONDS:
                raise UserError(
                    f"--time={text} is too long for Slurm; allowed: up to 31 years, or UNLIMITED"
                )
            return float(-(-seconds // 60) * 60) or float("inf")
    raise UserError(
        f"--time={text} is no time limit; allowed: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, "
        "D-HH:MM:SS, UNLIMITED"
    )


def notice_s(signal: str) -> int:
    """How long before the time limit `--signal` tells a job to end, in seconds.

    Raises:
        UserError: it does not say.
    """
    match = re.fullmatch(r"(?:[RB]+:)?\w+(?:@(\d+))?", signal, re.ASCII)
    if match is None:
        raise UserError(f"--signal={signal} must be like B:USR1@300")
    return _NOTICE_S if match[1] is None else int(match[1])


def header_length(lines: list[str]) -> int:
    """How many lines of a batch script sbatch looks at: those before the first command."""
    commands = (n for n, line in enumerate(lines) if line.strip() and line.lstrip()[0] != "#")
    return next(commands, len(lines))


def read_options(lines: list[str]) -> list[Option]:
    """The options in the directives of a batch script, as sbatch reads them; later ones win.

    Raises:
        UserError: a line is none that sbatch can read.
    """
    found: list[Option] = []
    for number, line in enumerate(lines[: header_length(lines)]):
        if line.startswith("#SBATCH"):
            options = list(_options(_words(line.removeprefix("#SBATCH"))))
            found += [Option(number, *option, len(options) == 1) for option in options]
    return found


def _options(words: list[str]) -> Iterator[tuple[str, str]]:
    """Long name and value of each option in the words of a line."""
    left = list(words)
    while left:
        word = left.pop(0)
        follows = left[:1] if left and not left[0].startswith("-") else []
        if match := re.fullmatch(r"--([a-z][a-z-]*)(?:=(.*))?", word, re.DOTALL):
            name, value = match[1], match[2]
        elif len(word) > 1 and word[0] == "-" and word[1] in _SHORT:
            name, value = _SHORT[word[1]], word[2:] or None
        elif len(word) > 1 and word[0] == "-" and word[1] in _SHORT_SWITCHES:
            name, value, follows = _SHORT_SWITCHES[word[1]], word[2:], []
        else:
            raise UserError(f"#SBATCH {' '.join(words)}: {word!r} is no option of sbatch")
        if value is None and follows:
            value = left.pop(0)
        yield name, value or ""


def _words(text: str) -> list[str]:
    """The words of a directive: quotes keep blanks and '#', backslashes keep what follows."""
    words: list[str] = []
    word: list[str] | None = None
    quote = ""
    at = 0
    while at < len(text):
        char = text[at]
        at += 1
        if not quote and char.isspace():
            words += [] if word is None else ["".join(word)]
            word = None
        elif not quote and char == "#":  # a comment, even in a word
            break
        elif char == quote:
            quote = ""
        elif not quote and char in "\"'":
            quote, word = char, word or []
        else:
            if char == "\\" and at < len(text) and (quote or not text[at].isspace()):
                char = text[at]
                at += 1
            word = [*(word or []), char]
    if quote:
        raise UserError(f"#SBATCH{text}: a quote is not closed")
    return words if word is None else [*words, "".join(word)]
