"""Small tokenizers, corpora and configs that the data tests share."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from sentencepiece import SentencePieceTrainer

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.facts import Facts, InputFacts, TokenizerFacts
from megatron_hybrid.data.indexed import IndexedFileWriter, masked_dtype, token_dtype
from megatron_hybrid.data.tokenizer import NullTokenizer

# How long an example takes says more about the machine than about the code.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

VOCAB_SIZE = 1000
EOD = VOCAB_SIZE - 1

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "Tabs\t, non-ASCII: naïve 東京 🙂, spaces   kept  ",
    "A literal </s> and <s> and <unk> and <0x0A> in a page.",
    "nul \x00 byte",
]


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-fallback BPE model of 400 pieces; eos is id 1."""
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter([*TEXTS, "the quick brown fox returns to the lazy dog"] * 20),
            model_writer=file,
            model_type="bpe",
            vocab_size=350,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            unk_id=0,
            eos_id=1,
            bos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    return path


def write_corpus(prefix: Path, documents: Sequence[Sequence[int]], vocab: int = VOCAB_SIZE) -> str:
    """Write documents of ids as an indexed file; gives its prefix as text."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    writer = IndexedFileWriter(prefix, vocab)
    for document in documents:
        writer.add_documents(
            np.array(document, dtype=token_dtype(vocab)).tobytes(),
            np.array([len(document)], dtype=np.int32),
        )
    writer.finish()
    writer.publish()
    return str(prefix)


def write_conversations(
    prefix: Path, conversations: Sequence[tuple[Sequence[int], Sequence[bool]]], vocab: int
) -> str:
    """Write conversations, each of ids and which of them are learnt, as an indexed file whose facts
    name the tokenizer of ids written as text; gives its prefix as text."""
    writer = IndexedFileWriter(prefix, vocab, with_mask=True)
    for ids, learnt in conversations:
        tokens = np.zeros(len(ids), dtype=masked_dtype(vocab))
        tokens["id"], tokens["learnt"] = ids, learnt
        writer.add_documents(tokens.tobytes(), np.array([len(ids)], dtype=np.int32))
    tokenizer = NullTokenizer(vocab)
    writer.attach(
        Facts(
            **vars(writer.finish()),
            tokenizer=TokenizerFacts("null", tokenizer.fingerprint, vocab, tokenizer.eod),
            append_eod=False,
            shuffle_seed=None,
            input=InputFacts((), len(conversations), 0, 0),
        )
    )
    writer.publish()
    return str(prefix)


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., RunConfig]:
    """Makes a config from data and training fields; samples of 32 tokens, 10 batches of 8."""

    def make(data: dict[str, Any] | None = None, **training: Any) -> RunConfig:
        defaults = {"train_iters": 10, "global_batch_size": 8, "micro_batch_size": 2}
        return RunConfig.model_validate(
            {
                "run_dir": tmp_path / "run",
                "model": {"hybrid_layer_pattern": "M", "hidden_size": 64, "vocab_size": VOCAB_SIZE},
                "optimizer": {"lr": 1e-3},
                "training": defaults | training,
                "data": {"seq_length": 32, "tokenizer_type": "null", "num_workers": 0}
                | (data or {}),
            }
        )

    return make
