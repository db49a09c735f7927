"""Texts on which two implementations of a tokenizer would differ, if they did anywhere."""

import random
from collections.abc import Sequence

_SEED = 20_24
_MIXTURES = 300
_LONG_CHARACTERS = 80_000  # beyond the length from which fastokens cuts a text for its threads
_PIECES = (
    # Words, contractions in both cases, numbers of all lengths, code
    "a", "B", "the", " the", "The", " World", "camelCase", "snake_case", "__init__", "I'm", "'s",
    "'S", "'ll", "\u2019s", "don't", "1", "12", " 123", "1234567", "3.14", "1e-5", "0x7f", "-",
    "--", "==", "!=", "//", "/*", "*/", "\\n", "#", "_", "{", "}", "();", "http://a.b/c?d=e&f#g",
    "...",
    # White space of all kinds
    " ", "  ", "    ", "\n", "\n\n", "\r\n", " \n", "\t", "\v", "\f", "\x85", "\xa0", "\u2028",
    "\u3000", "\u200b", "\ufeff",
    # Control characters, ends of the Unicode ranges, unassigned and private characters
    "\0", "\x01", "\x1f", "\x7f", "\ud7ff", "\ue000", "\uffff", "\U0010ffff", "\U000e0001",
    "\u0378",
    # Composed, decomposed and compatibility characters; marks on their own; special case mappings
    "é", "e\u0301", "\u0301", "Å", "\u212b", "\u2126", "\u0344", "\u0958", "ﬁ", "½", "²", "Ⅷ", "ª",
    "ʰ", "\u017f", "K", "ẞ", "İ", "\u0131", "ǅ", "\U0001d400", "٣", "४",
    # Scripts without spaces, with conjuncts, right to left; full-width punctuation
    "東京", "日本語の", "한국어", "\u1100\u1161\u11a8", "ไทย", "ก็", "हिन्दी", "العربية", "עברית",
    "русский", "Ελληνικά", "\uff0c", "。", "\u201c", "\u201d",
    # Emoji: joined, with skin tone, flags
    "🙂", "👩‍👩‍👧", "👍🏽", "🇩🇪", "\ufe0f",
    # Byte-level and metaspace alphabets written out, byte fallback written out
    "▁", "▁the", "Ġ", "Ġthe", "Ċ", "<0x0A>", "<", ">", "[", "]", "<|", "|>",
)  # fmt: skip


def hard_texts(added_tokens: Sequence[str]) -> list[str]:
    """The same texts each time, about 200 KB and 40 bytes more for each added token.

    Args:
        added_tokens: the texts of the tokenizer's added tokens, special and other, which appear
            alone, inside words, after spaces, cut short, and next to each other.
    """
    draw = random.Random(_SEED)
    alone = ["", *_PIECES, " " * 400, "\n" * 400, "x" * 5000, "ab" * 2000, "東京" * 500, "." * 900]
    spelled = [_around(token, draw) for token in added_tokens]
    few_tokens = draw.sample(list(added_tokens), min(len(added_tokens), 40))
    pieces = [*_PIECES, *few_tokens]
    mixtures = ["".join(draw.choices(pieces, k=draw.randrange(2, 40))) for _ in range(_MIXTURES)]
    characters = ["".join(map(_character, [draw] * 20)) for _ in range(_MIXTURES)]
    long = "".join(draw.choices(pieces, k=_LONG_CHARACTERS // 4))
    return [*alone, *spelled, *mixtures, *characters, long]


def _around(token: str, draw: random.Random) -> str:
    before, after = draw.choices(("", " ", "x", "\n", token, "  "), k=2)
    cut = draw.randrange(len(token)) if token else 0
    return f"{token} a{before}{token}{after}{token[:cut]} {token[cut:]}"


def _character(draw: random.Random) -> str:
    """A character of ASCII, of the Latin, or of any script or plane; no surrogates."""
    last = draw.choice((0x7F, 0x24F, 0xD7FF, 0x10FFFF))
    code = draw.randrange(last + 1)
    return chr(code) if not 0xD800 <= code <= 0xDFFF else " "
