"""The far ends of what may be given: of numbers, texts and paths, in configs and as options.

Nobody comes near them but by mistake. Beyond them a number has no place in the formats that it ends
up in, and a file no name.
"""

import math
import os
from pathlib import Path

# Counts, sizes and ranks are int32 in torch, NCCL and the kernels.
MOST_COUNT = 2**31 - 1
# That this program starts on one machine, or threads.
MOST_PROCESSES = 1024
MOST_NODES, MOST_GPUS, MOST_EXPERTS = 2**16, 2**20, 2**16
# The cache is allocated for all of them.
MOST_NEW_TOKENS = 2**20
# Where a float stops counting one by one; tokens are counted as such in logs and in JSON.
MOST_TOKENS = MOST_BYTES = 2**53
# Within float32, whose smallest normal number is 1.2e-38 and whose largest 3.4e38.
LEAST_REAL, MOST_REAL = 1e-37, 1e38
# A little over 31 years; threads wait for at most 292.
MOST_SECONDS = 1e9
MOST_TEXT = 1000
# The kernel's limits are 255 and 4096 bytes; files are written beside and below, with longer names.
MOST_NAME_BYTES, MOST_PATH_BYTES = 200, 3000


def real_problem(value: float, *, positive: bool = False) -> str | None:
    """What a number must be to have a place in float32, as the end of "must be ..."; None: it is.

    Args:
        positive: it may not become 0 either.
    """
    if not math.isfinite(value):
        return "a finite number"
    if abs(value) > MOST_REAL:
        return f"of at most {MOST_REAL:g}"
    if positive and 0 < abs(value) < LEAST_REAL:
        return f"of at least {LEAST_REAL:g}"
    return None


def text_problem(text: str, most: int = MOST_TEXT) -> str | None:
    """The same for a text."""
    if "\0" in text:
        return "without the character NUL"
    if len(text) > most:
        return f"of at most {most} characters"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "in UTF-8"
    return None


def path_problem(path: str | Path) -> str | None:
    """The same for a path; its bytes need not be UTF-8."""
    text = os.fspath(path)
    if "\0" in text:
        return "without the character NUL"
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError:
        return "of characters that file names have"
    if len(data) > MOST_PATH_BYTES:
        return f"of at most {MOST_PATH_BYTES} bytes"
    if any(len(name) > MOST_NAME_BYTES for name in data.split(b"/")):
        return f"of names of at most {MOST_NAME_BYTES} bytes"
    return None
