"""What several tests of the converter start from: a small trained checkpoint."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from megatron_hybrid.data.indexed import IndexedFileWriter, token_dtype
from tests.warm import python

ROOT = Path(__file__).parents[2]
TEXT = (
    "the quick brown fox returns to the lazy dog, and the dog sleeps on.",
    "def double(x):\n    return 2 * x\n",
    "one, two, three, four, five, six, seven, eight, nine, ten.",
)
# One layer of each kind, as nemotron_h can hold them.
MODEL = [
    "model.hybrid_layer_pattern=M-M*E-", "model.hidden_size=48", "model.ffn_hidden_size=96",
    "model.num_attention_heads=4", "model.num_query_groups=2", "model.kv_channels=10",
    "model.mamba_head_dim=12", "model.mamba_state_dim=8", "model.mamba_num_groups=2",
    "model.num_moe_experts=4", "model.moe_ffn_hidden_size=32",
    "model.moe_shared_expert_intermediate_size=40", "model.moe_router_score_function=sigmoid",
    "model.moe_router_enable_expert_bias=true", "model.moe_router_topk_scaling_factor=1.5",
]  # fmt: skip


def run_cli(*words: object) -> subprocess.CompletedProcess[str]:
    """`megatron-hybrid WORDS...` in a process of its own; its output."""
    return run_python("-m", "megatron_hybrid.cli", *words)


def run_python(*words: object) -> subprocess.CompletedProcess[str]:
    """A program of Python in a process of its own."""
    return subprocess.run(
        [python(), *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-fallback BPE model; its end piece is id 1."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT * 20), model_writer=file, model_type="bpe", vocab_size=340,
            hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, add_dummy_prefix=False, unk_id=0, eos_id=1, bos_id=2,
            pad_id=-1, minloglevel=2,
        )  # fmt: skip
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: Path) -> Path:
    """A run's folder: thirty steps on a few sentences, in fp32, on one rank."""
    folder = tmp_path_factory.mktemp("trained")
    processor = SentencePieceProcessor(model_file=str(sentencepiece_model))
    vocab_size = processor.get_piece_size()
    writer = IndexedFileWriter(folder / "text", vocab_size)
    for text in TEXT * 40:
        ids = np.array([*processor.encode(text), processor.eos_id()], token_dtype(vocab_size))
        writer.add_documents(ids.tobytes(), np.array([len(ids)], dtype=np.int32))
    writer.finish()
    writer.publish()
    done = run_cli(
        "pretrain", *MODEL, f"data.data_path={folder / 'text'}", "data.split=100,0,0",
        f"data.tokenizer_model={sentencepiece_model}", "data.seq_length=64", "data.num_workers=0",
        "precision.recipe=fp32", "training.global_batch_size=4", "training.micro_batch_size=4",
        "training.train_iters=30", "optimizer.lr=1e-2", "logging.tensorboard=false",
        f"run_dir={folder / 'run'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run"
