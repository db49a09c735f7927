"""Characters that a byte-pair tokenizer would leave out without a word.

`tokenizers` drops what is in no vocabulary where the model has neither an unknown token nor bytes
to fall back to.
"""

import re
from typing import Any

_NEVER = (0xC0, 0xC1, *range(0xF5, 0x100))  # of the bytes of UTF-8
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256) if byte not in _NEVER)
_MOST_SHOWN = 10


class Losses:
    """What a tokenizer cannot hold; see `find`.

    Args:
        tokenizer: of the library `tokenizers`.
    """

    def __init__(self, tokenizer: Any, alphabet: frozenset[str]) -> None:
        self._tokenizer, self._alphabet = tokenizer, alphabet
        # Found in texts as they are, before these are cut into characters.
        whole = [
            re.escape(token.content)
            for token in tokenizer.get_added_tokens_decoder().values()
            if token.content and not (token.special and tokenizer.encode_special_tokens)
        ]
        self._whole = re.compile("|".join(sorted(whole, key=len, reverse=True)) or r"(?!)")

    @classmethod
    def find(cls, tokenizer: Any) -> "Losses | None":
        """None where nothing can be lost."""
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel

        model = tokenizer.model
        if not isinstance(model, BPE) or model.unk_token is not None:
            return None
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        if model.byte_fallback and all(byte in vocabulary for byte in _BYTES):
            return None
        begin, end = model.continuing_subword_prefix or "", model.end_of_word_suffix or ""
        bare = (token.removeprefix(begin).removesuffix(end) for token in vocabulary)
        alphabet = frozenset(token for token in (*vocabulary, *bare) if len(token) == 1)
        # As themselves, those bytes that no UTF-8 has.
        needed = frozenset(ByteLevel.alphabet()) - {chr(byte) for byte in _NEVER}
        cut = {each for piece in _pieces(tokenizer, "\N{GRINNING FACE}\xe9") for each in piece}
        if cut <= needed <= alphabet:  # every text is cut into bytes first
            return None
        return cls(tokenizer, alphabet)

    def problem(self, text: str) -> str | None:
        """A sentence with the characters of a text that would be left out; None: there are none."""
        parts = (_pieces(self._tokenizer, part) for part in self._whole.split(text))
        found = {character for pieces in parts for piece in pieces for character in piece}
        lost = sorted(found - self._alphabet)
        if not lost:
            return None
        more = ", ..." if len(lost) > _MOST_SHOWN else ""
        return (
            f"the tokenizer has no ids for {', '.join(map(repr, lost[:_MOST_SHOWN]))}{more}, and "
            "neither an unknown token nor bytes to fall back to: they would be left out"
        )


def _pieces(tokenizer: Any, text: str) -> list[str]:
    """What a text is cut into before it becomes ids."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
