"""A source of conversations, read as rows of whole ones: a plan sees a source like any other.

Its tokens are numbered as if the rows stood one after the other, each of `seq_length` tokens, with
one token more behind the last, so that a window and its last label, of `seq_length + 1` tokens, lie
in the source. What no conversation fills is the end token, a document of its own, of which nothing
is learnt.
"""

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.index import Index
from megatron_hybrid.data.rows import Rows, pack_rows
from megatron_hybrid.data.shard import Shard
from megatron_hybrid.data.source import Source
from megatron_hybrid.data.tokenizer import HuggingFaceTokenizer, Tokenizer

logger = logging.getLogger(__name__)

_LOOKED_AT = 64  # conversations of a source, for what ends them


class _Part(NamedTuple):
    """Tokens of a conversation in a row: the first of them in the source, how many, and the place
    in the row."""

    first: int
    tokens: int
    place: int


@dataclass(frozen=True)
class ConversationSource(Source):
    """Conversations of a source in rows of `seq_length` tokens.

    A longer one is cut behind `seq_length` tokens, or left out where nothing in them is learnt.

    Attributes:
        rows: which conversations each row holds.
        starts: `[n + 1]`, the first token of each conversation in the files.
        eod: what fills rows up.
    """

    seq_length: int = field(kw_only=True)
    eod: int = field(kw_only=True)
    rows: Rows = field(kw_only=True, repr=False, compare=False)
    starts: NDArray[np.int64] = field(kw_only=True, repr=False, compare=False)

    @property
    def tokens(self) -> int:
        """Of all rows, and the one behind them."""
        return len(self.rows) * self.seq_length + 1

    def share(self, begin: Fraction, end: Fraction) -> tuple[int, int]:
        """As `Source.share`, of whole rows."""
        first, last = (int(len(self.rows) * part) for part in (begin, end))
        return first * self.seq_length, last * self.seq_length + 1

    def read(self, offset: int, out: NDArray[np.int64]) -> None:
        """As `Source.read`, of one row and the token behind it."""
        out[:] = self.eod
        for first, count, place in self._parts(offset):
            super().read(first, out[place : place + count])

    def document_ends(self, offset: int, count: int) -> list[int]:
        """As `Source.document_ends`; end tokens of turns, within a conversation, end none."""
        return [part.place + part.tokens - 1 for part in self._parts(offset)]

    def read_learnt(self, offset: int, out: NDArray[np.bool_]) -> None:
        """Fill `out` `[seq_length + 1]` with which tokens of a row are to be learnt."""
        out[:] = False
        for first, count, place in self._parts(offset):
            out[place : place + count] = self.mask(first, count)

    def describe(self, token: int) -> str:
        """As `Source.describe`."""
        for first, count, place in self._parts(token - token % self.seq_length):
            if place <= token % self.seq_length < place + count:
                return super().describe(first + token % self.seq_length - place)
        return f"source {self.name}: the end of a row, which no conversation fills"

    def learns(self, ids: Collection[int]) -> bool:
        """Whether one of these tokens is learnt in the first conversations, of which some are
        looked at."""
        end = int(self.starts[: _LOOKED_AT + 1][-1])
        found = np.empty(end, dtype=np.int64)
        super().read(0, found)
        return bool(np.isin(found[self.mask(0, end)], list(ids)).any())

    def _parts(self, offset: int) -> Iterator[_Part]:
        row, inside = divmod(offset, self.seq_length)
        assert inside == 0, "windows are rows"
        place = 0
        for document in self.rows[row]:
            first, end = self.starts[document : document + 2].tolist()
            count = min(end - first, self.seq_length)
            yield _Part(first, count, place)
            place += count


def conversation_sources(
    sources: Mapping[str, Source], seq_length: int
) -> dict[str, ConversationSource]:
    """Sources whose samples are rows of whole conversations; what that costs is logged.

    Raises:
        DataError: with every source that has files without a mask.
    """
    problems = [
        f"source {source.name}: {shard.prefix} has no "
        f"{'facts (.meta.json) of its ' if shard.looks_masked else ''}mask of what is to be learnt "
        "(.mask); `megatron-hybrid data tokenize --chat` makes such files"
        for source in sources.values()
        for shard in source.shards
        if not shard.has_mask
    ]
    if problems:
        raise DataError("\n".join(problems))
    return {name: _in_rows(source, seq_length) for name, source in sources.items()}


def note_templates(sources: Mapping[str, Source], tokenizer: Tokenizer) -> None:
    """Say where conversations were made with another chat template than the one that goes into
    checkpoints and exports, or with several."""
    templates: dict[str, list[str]] = {}
    for source in sources.values():
        said = (shard.facts.chat_template for shard in source.shards if shard.facts is not None)
        for template in sorted({each for each in said if each is not None}):
            templates.setdefault(template, []).append(source.name)
    own = tokenizer.chat_templates() if isinstance(tokenizer, HuggingFaceTokenizer) else {}
    carried = hashlib.sha256(own["default"].encode()).hexdigest() if "default" in own else None
    if len(templates) > 1:
        logger.warning(
            "note: conversations were made with %d chat templates: those of %s",
            len(templates), "; ".join(", ".join(names) for names in templates.values()),
        )  # fmt: skip
    if others := [name for each, names in templates.items() if each != carried for name in names]:
        logger.warning(
            "note: %s: conversations were made with another chat template than that of "
            "data.tokenizer_model%s: whoever chats with the model must use theirs",
            ", ".join(sorted(set(others))), "" if carried else ", which has none",
        )  # fmt: skip


def note_ends(sources: Mapping[str, Source], ends: Collection[int], tokenizer: Tokenizer) -> None:
    """Say where nothing that is learnt ends a text, so that answers of the model do not end.

    Args:
        sources: of conversations.
        ends: tokens at which generation ends.
    """
    without = [
        name for name, source in sources.items()
        if isinstance(source, ConversationSource) and source.tokens > 1 and not source.learns(ends)
    ]  # fmt: skip
    if without:
        named = ", ".join(f"{each} ({tokenizer.decode([each])!r})" for each in sorted(ends))
        logger.warning(
            "note: %s: of what is learnt, no token ends a text, as %s does: answers of the model "
            "go on to their limit, or to a text of --stop; a tokenizer whose eos_token ends turns "
            "would end them", ", ".join(without), named,
        )  # fmt: skip


def note_masks(sources: Mapping[str, Source], objective: str) -> None:
    """Say where conversations are read as text."""
    found = [s.name for s in sources.values() if any(shard.looks_masked for shard in s.shards)]
    if found:
        logger.warning(
            "note: %s: conversations, of which training.objective=%s learns every token, whoever "
            "speaks; training.objective=sft learns what the assistant says",
            ", ".join(found), objective,
        )  # fmt: skip


def _lengths(shard: Shard) -> NDArray[np.int64]:
    """Tokens of each conversation, by the index, on which the rows depend.

    Raises:
        DataError: they do not make up the tokens.
    """
    index = Index(shard.prefix)
    found = np.concatenate([np.empty(0, np.int32), *index.lengths()]).astype(np.int64)
    if found.min(initial=0) < 0 or found.sum() != shard.tokens:
        raise DataError(
            f"{index.path} is damaged: its documents have {found.sum()} tokens, the .bin "
            f"{shard.tokens}; `megatron-hybrid data verify` says more"
        )
    return found


def _in_rows(source: Source, seq_length: int) -> ConversationSource:
    lengths = np.concatenate([np.empty(0, np.int64), *map(_lengths, source.shards)])
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    fitting = np.minimum(lengths, seq_length)
    cut = np.flatnonzero(lengths > seq_length).tolist()
    lost = 0
    for document in cut:
        # Nothing is predicted of the first.
        learnt = source.mask(int(starts[document]), int(lengths[document]))[1:]
        kept = int(learnt[: seq_length - 1].sum())
        lost += int(learnt.sum()) - kept
        fitting[document] = seq_length if kept else 0
    rows = pack_rows(fitting, seq_length)
    filled = int(fitting.sum()) / max(1, len(rows) * seq_length)
    logger.info(
        "source %s: %s conversations in %s rows of %s tokens, which are %.1f%% full",
        source.name, f"{np.count_nonzero(fitting):,}", f"{len(rows):,}", f"{seq_length:,}",
        100 * filled,
    )  # fmt: skip
    if cut:
        left_out = int(np.count_nonzero(lengths) - np.count_nonzero(fitting))
        whole = f"; {left_out:,} of these whole, with no answer in the first {seq_length}"
        logger.warning(
            "source %s: of %s conversations %s have more than data.seq_length=%s tokens, and what "
            "is behind is left out, %s learnt tokens%s",
            source.name, f"{len(lengths):,}", f"{len(cut):,}", seq_length, f"{lost:,}",
            whole if left_out else "",
        )  # fmt: skip
    facts = source.shards[0].facts
    assert facts is not None, "of the mask"
    return ConversationSource(
        source.name, source.shards, source.files,
        seq_length=seq_length, eod=facts.tokenizer.eod, rows=rows, starts=starts,
    )  # fmt: skip
