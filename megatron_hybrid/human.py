"""For people: numbers as they read them, and lines."""

import math
import sys
from typing import TextIO


def human_count(value: float, decimals: int = 1) -> str:
    """A few digits and a decimal unit: 812, 12.3K, 196.6K, 1.2B."""
    for unit in ("", "K", "M", "B"):
        # Not < 1000: 999.96 would be printed as 1000.0.
        if value < 1000 - 0.5 / 10**decimals:
            return f"{value:.{decimals}f}{unit}" if unit else f"{value:.0f}"
        value /= 1000
    return f"{value:.{decimals}f}T"


def human_duration(seconds: float) -> str:
    """HH:MM:SS, with the days before it where there are any."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour:02d}:{minute:02d}:{second:02d}"


def say(text: str, to: TextIO | None = None) -> None:
    """A line as it is, without colours or wrapping, at once: on stdout, if on no other stream.

    What the library tells people goes through here, through a `rich` console, or into the log.
    Python has None for a stdout that was closed before it started.
    """
    stream = to or sys.stdout
    if stream is not None:
        stream.write(f"{text}\n")
        stream.flush()
