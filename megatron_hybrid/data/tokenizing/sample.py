"""A few texts from all over the input, to see whether a fast encoder agrees on them."""

from collections.abc import Sequence
from itertools import islice

from megatron_hybrid.data.tokenizing.chunks import cut, range_at
from megatron_hybrid.data.tokenizing.inputs import Input
from megatron_hybrid.data.tokenizing.records import read_records

_PLACES = 16
_TEXTS_PER_PLACE = 25
_MAX_CHARACTERS = 4000  # of each: the reference encodes a megabyte a second


def sample_texts(inputs: Sequence[Input], keys: Sequence[str]) -> list[str]:
    """At most 400 texts, from 16 places spread over the bytes of the input.

    Where a file has to be decompressed, they are from its beginning.

    Raises:
        DataError: a file cannot be read.
    """
    texts: list[str] = []
    for item, position in _places(inputs):
        is_plain = item.format == "jsonl"
        chunks = [range_at(item, position)] if is_plain else islice(cut([item], keys), 1)
        for chunk in chunks:
            for column in read_records(chunk.payload, keys).texts:
                texts += [text[:_MAX_CHARACTERS] for text in column[:_TEXTS_PER_PLACE]]
    return texts


def _places(inputs: Sequence[Input]) -> set[tuple[Input, int]]:
    """Files, and positions in them: 0 for those that must be read from their beginning."""
    total = sum(item.bytes for item in inputs)
    places = set()
    for place in range(_PLACES):
        position = total * place // _PLACES
        number = 0
        while number < len(inputs) - 1 and position >= inputs[number].bytes:
            position -= inputs[number].bytes
            number += 1
        item = inputs[number]
        places.add((item, position if item.format == "jsonl" else 0))
    return places
