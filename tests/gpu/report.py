"""What a check has found, as a table of text."""

from typing import Any

RECORD = dict[str, Any]
SIDES = ("ours", "engine")
# In the JSON alone.
_LONG = {"name", "status", "why", "packages", "versions", "missing", "case", *SIDES}


def as_text(records: dict[str, RECORD]) -> str:
    """A line a step, and below it its parts."""
    lines = []
    for name, record in records.items():
        why = record["why"].splitlines()
        lines.append(
            f"{name:17}{record['status']:11}{record['seconds']:7.1f} s  {''.join(why[:1])}"
        )
        lines += [f"    | {line}" for line in why[1:]]
        for part in record["parts"]:
            said = [part["why"]] if part.get("why") else []
            said += [f"{key} {_short(part[key])}" for key in part if key not in _LONG]
            lines.append(f"  {part['name']:34} {part['status']:9}{', '.join(said)}".rstrip())
            lines += _sides({side: part[side] for side in SIDES if side in part})
    return "\n".join(lines)


def _sides(sides: dict[str, RECORD]) -> list[str]:
    """A training step of ours and of the engine's specs; then the time of both by layer kind."""
    lines = []
    for side, it in sides.items():
        figures = [f"{it['step_ms']:9,.1f} ms", f"{it['tokens_per_s']:10,.0f} tokens/s"]
        figures += [] if it["mfu"] is None else [f"MFU {it['mfu']:.1%}"]
        figures += [] if it["memory_gib"] is None else [f"{it['memory_gib']:.1f} GiB"]
        lines.append(f"    {side:8}{'  '.join(figures)}  first loss {it['first_loss']:.4f}")
    profiles = {
        side: {row["what"]: row for row in it["profile"]["rows"]} for side, it in sides.items()
    }
    for what in dict.fromkeys(what for rows in profiles.values() for what in rows):
        found = [f"{side} {_passes(rows[what])}" for side, rows in profiles.items() if what in rows]
        lines.append(f"      {what:26}{'   '.join(found)}")
    if lines:
        lines.insert(len(sides), "      ms a step, recorded: forward + backward = in all")
    return lines


def _passes(row: RECORD) -> str:
    passes = [row["forward_ms"], row["backward_ms"]]
    shown = " + ".join(f"{ms:8.2f}" for ms in passes) if any(passes) else " " * 19
    return f"{shown} = {row['total_ms']:8.2f}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(map(_short, value)) or "none"
    return str(value)
