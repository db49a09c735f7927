"""What Megatron-LM's flags that are not taken mean here; the table is megatron_flags.txt."""

from functools import cache
from importlib import resources


@cache
def explained() -> dict[str, str]:
    """Sentences by the name of a flag, without dashes."""
    text = resources.files("megatron_hybrid.config") / "megatron_flags.txt"
    found: dict[str, str] = {}
    for block in text.read_text(encoding="utf-8").split("\n\n")[1:]:
        sentence, *lines = block.strip().splitlines()
        for name in " ".join(lines).split():
            assert name not in found, f"--{name} is explained twice"
            found[name] = sentence
    return found


def meaning(flag: str) -> str | None:
    """What to use in the place of a flag, or why there is nothing; None: it is none of theirs."""
    return explained().get(flag.removeprefix("--").replace("_", "-"))
