"""How causal attention is cut in blocks of queries: arithmetic, without torch.

The kernel runs by this plan, and the planner knows by it which masks the kernel keeps.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

# Documents shorter than this share a block; a block that needs a mask has at most the other many
# queries, so that the mask stays small.
SMALL_BLOCK_TOKENS = 256
MASKED_BLOCK_TOKENS = 1024


class Block(NamedTuple):
    """Queries [start, stop) of the text attend to keys [key_start, stop), and to the first `metas`
    of the text, which are before those."""

    start: int
    stop: int
    key_start: int
    exactly_causal: bool
    metas: int = 0

    @property
    def keys(self) -> int:
        """How many there are."""
        return self.stop - self.key_start + self.metas


def plan_blocks(
    chunks: Sequence[tuple[int, int]],
    starts: Sequence[int],
    length: int,
    window: int | None,
    num_meta_tokens: int = 0,
) -> list[Block]:
    """Cut the queries of `chunks` in blocks; `starts` are the first tokens of the documents, and
    the first `num_meta_tokens` of the text are seen from everywhere."""
    ends = [*starts[1:], length]
    blocks = []
    for start, chunk_stop in chunks:
        while start < chunk_stop:
            document = bisect_right(starts, start) - 1
            key_start, stop = starts[document], min(ends[document], chunk_stop)
            one_document = True
            while stop - start < SMALL_BLOCK_TOKENS and stop < chunk_stop:
                document += 1
                if ends[document] - starts[document] >= SMALL_BLOCK_TOKENS:
                    break
                stop, one_document = min(ends[document], chunk_stop), False
            if window is not None:
                stop = min(stop, start + max(window, SMALL_BLOCK_TOKENS))
                key_start = max(key_start, start - window + 1)
            metas = min(num_meta_tokens, key_start)
            exactly_causal = (
                one_document
                and key_start == start
                and (window is None or stop - start <= window)
                and not metas
            )
            if not exactly_causal:
                stop = min(stop, start + MASKED_BLOCK_TOKENS)
            blocks.append(Block(start, stop, key_start, exactly_causal, metas))
            start = stop
    return blocks
