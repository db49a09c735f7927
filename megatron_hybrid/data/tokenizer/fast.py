"""fastokens: byte-pair encoding tens of times as fast as `tokenizers`, with the same ids.

It reads fewer kinds of `tokenizer.json` than `tokenizers`, so it is asked first whether it can read
one, and then held against `tokenizers` on texts. Two things it does otherwise are known, and texts
that show them are encoded by `tokenizers`: see `_left_to_tokenizers`.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_hybrid.json_text import parse_json

logger = logging.getLogger(__name__)

# The first two are of a file's last use, and would lose or add text.
_UNUSED_PARTS = ("truncation", "padding", "post_processor", "decoder")


class FastokensError(Exception):
    """Why fastokens cannot stand in for `tokenizers`."""


def use_one_thread() -> None:
    """Keep both libraries to the calling thread; to be called before their first use in a process.

    Parallelism is by processes, each with one encoding thread: both libraries would start a thread
    a core in each of them. That is set whatever the environment says, and the processes started
    from here inherit it.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["FASTOKENS_BPE_THREADS"] = "1"


class FastEncoder:
    """A `tokenizer.json` in fastokens.

    Args:
        content: of the file.
        reference: the same file in `tokenizers`, set up as texts are to be encoded.

    Raises:
        FastokensError: fastokens is not installed, or cannot read this file.
    """

    def __init__(self, content: bytes, reference: Any) -> None:
        self._reference = reference
        self._split_special = reference.encode_special_tokens
        self._left = _left_to_tokenizers(reference)
        try:
            import fastokens
        except ImportError as error:
            raise FastokensError(f"it cannot be imported ({error})") from error
        # Only what encoding needs: no kind of decoder must keep it from reading the file.
        try:
            parts = parse_json(content) | dict.fromkeys(_UNUSED_PARTS)
        except ValueError as error:  # that tokenizers reads: nested deeper than anybody means
            raise FastokensError(f"it cannot be read ({error})") from error
        self._fast = _guarded(fastokens.Tokenizer.from_json_str, json.dumps(parts))

    def check(self, texts: Sequence[str]) -> None:
        """Raises FastokensError if the ids of any of `texts` are not those of `tokenizers`."""
        ids, lengths = self._encode_fast(texts)
        ends = np.cumsum(lengths, dtype=np.int64)
        for text, end, length in zip(texts, ends, lengths, strict=True):
            expected = self._encode_reference(text)
            if not np.array_equal(ids[end - length : end], expected):
                shown = text if len(text) <= 60 else text[:60] + "…"
                raise FastokensError(f"its ids differ from those of tokenizers for {shown!a}")

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int32]]:
        """Ids of all texts end to end, and their lengths."""
        try:
            return self._encode_fast(texts)
        except FastokensError as error:
            # Seen nowhere; its regular expressions have limits that a text could exceed.
            logger.warning("encoding %d texts with tokenizers: %s", len(texts), error)
            return joined([self._encode_reference(text) for text in texts])

    def _encode_fast(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int32]]:
        encode = self._fast.encode_batch_flat
        raw_ids, raw_ends = _guarded(encode, list(texts), split_special_tokens=self._split_special)
        ids = np.frombuffer(raw_ids, dtype="<u4")
        bounds = np.frombuffer(raw_ends, dtype="<u8").astype(np.int64)
        left = [i for i, text in enumerate(texts) if self._left and self._left.search(text)]
        if not left:
            return ids, np.diff(bounds).astype(np.int32)
        rows = [ids[begin:end] for begin, end in pairwise(bounds)]
        for index in left:
            rows[index] = self._encode_reference(texts[index])
        return joined(rows)

    def _encode_reference(self, text: str) -> NDArray[np.uint32]:
        return np.array(self._reference.encode(text, add_special_tokens=False).ids, np.uint32)


def joined(rows: Sequence[ArrayLike]) -> tuple[NDArray[np.uint32], NDArray[np.int32]]:
    """Rows of ids end to end, and the length of each."""
    arrays = [np.asarray(row, dtype=np.uint32) for row in rows]
    lengths = np.fromiter(map(len, arrays), dtype=np.int32, count=len(arrays))
    return np.concatenate([np.empty(0, np.uint32), *arrays]), lengths


def _guarded(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call into fastokens; what goes wrong there is FastokensError."""
    try:
        return function(*arguments, **named)
    except Exception as error:
        raise FastokensError(str(error)) from error
    except BaseException as error:
        # A panic in Rust arrives as a class that nothing exports and that is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise FastokensError(f"it panicked: {error}") from error


def _left_to_tokenizers(reference: Any) -> re.Pattern[str] | None:
    """Finds the texts that fastokens gets wrong; None where no text is one.

    - Added tokens with flags (whole words only, white space at a side taken along) are matched
      differently where several of them meet.
    - A special token that is to be encoded as text hides an ordinary added token that overlaps it
      from `tokenizers` (`im_start` in `<|im_start|>`), not from fastokens.

    Raises:
        FastokensError: those tokens are looked for in normalised text, which is not at hand.
    """
    added = list(reference.get_added_tokens_decoder().values())
    hidden_from = [token.content for token in added if not token.special]
    left = []
    for token in added:
        flagged = token.lstrip or token.rstrip or token.single_word
        if token.special and reference.encode_special_tokens:
            # Skipped as a whole, flags or not.
            flagged = any(_overlap(token.content, other) for other in hidden_from)
        if flagged:
            left.append(token)
    if not left:
        return None
    if reference.normalizer is not None and any(token.normalized for token in left):
        raise FastokensError(
            f"it may match {left[0].content!r} in normalised text otherwise than tokenizers"
        )
    return re.compile("|".join(re.escape(token.content) for token in left))


def _overlap(one: str, other: str) -> bool:
    """Whether occurrences of the two in a text could share characters."""
    if one in other or other in one:
        return True
    return _ends_meet(one, other) or _ends_meet(other, one)


def _ends_meet(first: str, second: str) -> bool:
    lengths: Iterable[int] = range(1, min(len(first), len(second)))
    return any(first.endswith(second[:length]) for length in lengths)
