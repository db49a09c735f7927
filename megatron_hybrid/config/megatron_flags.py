"""What Megatron-LM's flags that are not taken mean here; the table is megatron_flags.txt."""

from functools import cache
from importlib import resources


@cache
def explained() -> tuple[dict[str, str], dict[str, str]]:
    """Sentences by the whole name of a flag, without dashes, and by the beginning of names."""
    text = resources.files("megatron_hybrid.config") / "megatron_flags.txt"
    whole: dict[str, str] = {}
    beginnings: dict[str, str] = {}
    for block in text.read_text(encoding="utf-8").split("\n\n")[1:]:
        sentence, *lines = block.strip().splitlines()
        for name in " ".join(lines).split():
            table = beginnings if name.endswith("*") else whole
            assert name not in table, f"--{name} is explained twice"
            table[name.removesuffix("*")] = sentence
    return whole, beginnings


def meaning(flag: str) -> str | None:
    """What to use in the place of a flag, or why there is nothing; None: it is no known one."""
    name = flag.removeprefix("--").replace("_", "-")
    whole, beginnings = explained()
    if name in whole:
        return whole[name]
    fitting = [beginning for beginning in beginnings if name.startswith(beginning)]
    return beginnings[max(fitting, key=len)] if fitting else None
