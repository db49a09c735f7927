"""A checkpoint's tokenizer as the files that transformers' AutoTokenizer reads."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_converter.errors import ConversionError
from checkpoints_converter.sentencepiece_model import first_difference, read_model, tokenizer_json
from megatron_hybrid.checkpoint.carried import Carried
from megatron_hybrid.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from megatron_hybrid.fileio import write_atomic
from megatron_hybrid.small_files import read_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Specials:
    """Ids of special tokens; None where there is none."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None


def added_beyond(folder: Path, tokenizer: Tokenizer) -> str | None:
    """What to say of tokens that a folder's other files add to its tokenizer's, as transformers
    does; None: there are none.
    """
    added: dict[str, Any] = dict(_object(folder / "added_tokens.json"))
    decoder = _object(folder / HuggingFaceTokenizer.config_name).get("added_tokens_decoder")
    for text, token in (decoder if isinstance(decoder, dict) else {}).items():
        content = token.get("content") if isinstance(token, dict) else None
        added[str(content)] = int(text) if text.isdecimal() else None
    beyond = [
        name for name, each in added.items()
        if type(each) is int and each >= tokenizer.vocab_size
    ]  # fmt: skip
    if not beyond:
        return None
    return (
        f"its {tokenizer.file_name} lacks {len(beyond)} tokens that are added beside it, such as "
        f"{beyond[0]!r}: in texts here they are characters, where no tokenizer.json has them"
    )


def _object(path: Path) -> dict[str, Any]:
    return read_json(path, ConversionError) if path.is_file() else {}


def write_tokenizer(
    tokenizer: Tokenizer | None, folder: Path, carried: Carried
) -> tuple[Specials, str]:
    """Write a tokenizer's files; its special tokens, and a sentence for the model card.

    Args:
        tokenizer: the checkpoint's; None where it has none.
        carried: files that will be there, too: none of them is made up.
    """
    if tokenizer is None:
        return Specials(), "none (the checkpoint has none)"
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _hugging_face(tokenizer, folder)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _sentencepiece(tokenizer, folder, carried)
    return Specials(eos=tokenizer.eod), "none (the run read token ids)"


def _hugging_face(tokenizer: HuggingFaceTokenizer, folder: Path) -> tuple[Specials, str]:
    """The very files; a tokenizer_config.json is made where the run had none."""
    tokenizer.save_copy(folder)
    config = folder / HuggingFaceTokenizer.config_name
    if not config.is_file():
        _write_config(folder, {"eos_token": tokenizer.decode([tokenizer.eod])})
    bos, pad = (tokenizer.special_id(name) for name in ("bos_token", "pad_token"))
    return Specials(bos, tokenizer.eod, pad), "the run's own tokenizer.json"


def _sentencepiece(
    tokenizer: SentencePieceTokenizer, folder: Path, carried: Carried
) -> tuple[Specials, str]:
    """tokenizer.model as it is, and a tokenizer.json where one gives the same ids."""
    tokenizer.save_copy(folder)
    content = (folder / SentencePieceTokenizer.file_name).read_bytes()
    model = read_model(content)
    specials = Specials(*(id if id >= 0 else None for id in (model.bos, model.eos, model.pad)))
    if HuggingFaceTokenizer.config_name in carried:  # which says how transformers opens it
        return specials, "sentencepiece's tokenizer.model, as it came"
    text = tokenizer_json(model)
    difference = "of a kind that tokenizers has not" if text is None else None
    if text is not None:
        difference = first_difference(text, tokenizer.encode)
    if text is None or difference is not None:
        logger.warning(
            "the tokenizer is kept as tokenizer.model only, which AutoTokenizer does not open by "
            "itself: %s", difference,
        )  # fmt: skip
        return specials, "sentencepiece's tokenizer.model"
    write_atomic(folder / HuggingFaceTokenizer.file_name, text)
    names = {"bos_token": model.bos, "eos_token": model.eos, "unk_token": model.unk,
             "pad_token": model.pad}  # fmt: skip
    _write_config(folder, {name: model.pieces[id].text for name, id in names.items() if id >= 0})
    return specials, "sentencepiece's tokenizer.model, and the same as tokenizer.json"


def _write_config(folder: Path, tokens: dict[str, str]) -> None:
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        **tokens,
    }
    path = folder / HuggingFaceTokenizer.config_name
    write_atomic(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
