"""A sentencepiece model as the tokenizer.json of Hugging Face's tokenizers, if one says the same.

sentencepiece knows no text that stands for a control piece; tokenizers does, as transformers
users expect: `</s>` in a prompt is the end token there. On all other text the ids are the same,
which is tried before the file is used.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hybrid.data.tokenizer.hard_texts import hard_texts

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what sentencepiece writes for a space
_BPE = 2
_CONTROL, _USER_DEFINED, _UNKNOWN = 3, 4, 2
_IDENTITY = "identity"


@dataclass(frozen=True)
class ScoredPiece:
    """A piece of the vocabulary; `kind` as sentencepiece numbers them."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What of a `.model` matters to encoding; ids of special pieces are -1 where there is none."""

    kind: int
    pieces: tuple[ScoredPiece, ...]
    byte_fallback: bool
    add_dummy_prefix: bool
    plain_spaces: bool
    normalization: str
    bos: int
    eos: int
    unk: int
    pad: int


def read_model(content: bytes) -> SentencePieceModel:
    """Parse a `.model` file."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(content)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    return SentencePieceModel(
        kind=trainer.model_type,
        pieces=tuple(ScoredPiece(p.piece, p.score, p.type) for p in proto.pieces),
        byte_fallback=trainer.byte_fallback,
        add_dummy_prefix=normalizer.add_dummy_prefix,
        plain_spaces=normalizer.escape_whitespaces and not normalizer.remove_extra_whitespaces,
        normalization=normalizer.name if normalizer.precompiled_charsmap else _IDENTITY,
        bos=trainer.bos_id,
        eos=trainer.eos_id,
        unk=trainer.unk_id,
        pad=trainer.pad_id,
    )


def tokenizer_json(model: SentencePieceModel) -> str | None:
    """A tokenizer.json for the model; None for kinds that it is not made for.

    Made for byte-pair encoding whose normalization changes nothing, which is what is trained today.
    Others fold characters by tables of their own; and tokenizers' unigram model takes the names of
    byte pieces in a text for these pieces.
    """
    if model.kind != _BPE or not model.plain_spaces or model.normalization != _IDENTITY:
        return None
    prefix = [{"type": "Prepend", "prepend": SPACE}] if model.add_dummy_prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(model.pieces),
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(model),
    }
    return json.dumps(values, ensure_ascii=False, indent=1) + "\n"


def first_difference(text: str, encode: Callable[[str], list[int]]) -> str | None:
    """The first of many hard texts that a tokenizer.json encodes in another way; None for none."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(text)
    for sample in hard_texts(()):
        if tokenizer.encode(sample, add_special_tokens=False).ids != encode(sample):
            return f"as tokenizer.json it encodes {sample[:60]!r} in another way"
    return None


def _added_tokens(pieces: Sequence[ScoredPiece]) -> list[dict[str, Any]]:
    return [
        {
            "id": number,
            "content": piece.text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": piece.kind != _USER_DEFINED,
        }
        for number, piece in enumerate(pieces)
        if piece.kind in (_CONTROL, _USER_DEFINED, _UNKNOWN)
    ]


def _bpe(model: SentencePieceModel) -> dict[str, Any]:
    """Merges in the order in which sentencepiece prefers them: best score of the result first."""
    ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    merges = [
        (-piece.score, ids[piece.text[:cut]], ids[piece.text[cut:]], cut, piece.text)
        for piece in model.pieces
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in ids and piece.text[cut:] in ids
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.pieces[model.unk].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": ids,
        "merges": [[text[:cut], text[cut:]] for *_, cut, text in sorted(merges)],
    }
