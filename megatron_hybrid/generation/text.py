"""Text of tokens as they come: a character may be spread over several, and a stop text too."""

from collections.abc import Sequence

from megatron_hybrid.data.tokenizer import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# Of the prompt, decoded along: a tokenizer may join or strip at the start of a text.
_TOKENS_BEFORE = 8


class TextStream:
    """The text of a continuation, piece by piece; `add` gives what is settled.

    Args:
        prompt: its tokens, of which the last are decoded along.
        stop: texts before which it ends. What may become the start of one is held back.

    Attributes:
        text: all that is settled.
        stopped: whether a stop text was found.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens = list(prompt[-_TOKENS_BEFORE:])
        self._start = 0  # of the tokens that are decoded along
        self._shown = len(self._tokens)  # those whose text was taken
        self._pending = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """One token more: the text that is settled by it, perhaps none."""
        self._tokens.append(token)
        return self._settle(self._decoded(last=False), last=False)

    def finish(self) -> str:
        """The text that is left, where it ends within a character or in the midst of a stop."""
        return self._settle(self._decoded(last=True), last=True)

    def _decoded(self, *, last: bool) -> str:
        before = self._tokenizer.decode(self._tokens[self._start : self._shown])
        whole = self._tokenizer.decode(self._tokens[self._start :])
        if whole.endswith(_UNFINISHED) and not last:
            return ""
        if len(self._tokens) > self._shown:
            self._start = max(self._shown - _TOKENS_BEFORE, 0)
            self._shown = len(self._tokens)
        return whole[len(before) :]

    def _settle(self, piece: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        pending = self._pending + piece
        places = [at for each in self._stop if (at := pending.find(each)) >= 0]
        if places:
            self.stopped, self._pending = True, ""
            settled = pending[: min(places)]
        else:
            held = 0 if last else _may_begin(pending, self._stop)
            settled = pending[: len(pending) - held]
            self._pending = pending[len(pending) - held :]
        self.text += settled
        return settled


def _may_begin(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of a text may be the start of a stop text."""
    longest = 0
    for each in stop:
        for size in range(min(len(each) - 1, len(text)), longest, -1):
            if each.startswith(text[-size:]):
                longest = size
                break
    return longest
