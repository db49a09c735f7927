"""A model exports to the same bytes whatever layout saved it, and Megatron-LM's names are known."""

import argparse
import enum
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from megatron.core import ModelParallelConfig
from megatron.core.transformer import TransformerConfig

from checkpoints_converter.export import ExportOptions, export
from checkpoints_converter.importing import ImportOptions, import_model
from megatron_hybrid.checkpoint.errors import CheckpointError
from megatron_hybrid.checkpoint.megatron_arguments import WITHOUT_EFFECT, run_values
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.writer import CheckpointWriter
from megatron_hybrid.config import RunConfig, load_config, rules
from megatron_hybrid.testing import run_distributed
from tests.checkpoints_converter.peer_models import VOCAB_SIZE, nemotron_h, saved

PATTERN = "M-ME*EM-"
# 61 tokens in 64 rows, so that the vocabulary divides by TP: the last three must be cut off.
PADDED = 64
LAYOUTS = {
    "one rank": (1, PATTERN, {}),
    "TP2": (2, PATTERN, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, "M-ME|*EM-", {"pipeline_model_parallel_size": 2}),
    "PP2xVPP2": (2, "M-|ME|*E|M-", {"pipeline_model_parallel_size": 2}),
    "TP2xPP2": (
        4,
        "M-ME|*EM-",
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
        },
    ),
    "EP2": (2, PATTERN, {"expert_model_parallel_size": 2}),
    "CP2": (2, PATTERN, {"context_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of transformers, and our import of it with a padded vocabulary."""
    folder = tmp_path_factory.mktemp("layouts")
    saved(nemotron_h(PATTERN), folder / "hf")
    (folder / "hf" / "LICENSE").write_text("free")
    imported = import_model(folder / "hf", folder / "ours", ImportOptions(vocabulary_multiple=64))
    assert imported.config.model.vocab_size == VOCAB_SIZE
    return folder / "hf", imported.folder


def _config(checkpoint: Path, pattern: str, sizes: dict[str, Any]) -> RunConfig:
    words = [str(checkpoint / "run_config.yaml"), f"model.hybrid_layer_pattern={pattern}"]
    words += [f"parallel.{name}={str(value).lower()}" for name, value in sizes.items()]
    return load_config([*words, "training.global_batch_size=4"], which=rules.NO_FILES)


def load_and_save(checkpoint: Path, pattern: str, sizes: dict[str, Any], save: Path) -> None:
    """On a rank: load a checkpoint into a layout, and save it as the trainer does."""
    from megatron_hybrid.checkpoint.carried import read_carried
    from megatron_hybrid.checkpoint.progress import Progress
    from megatron_hybrid.data.tokenizer import NullTokenizer
    from megatron_hybrid.training.checkpoint import Checkpointer, load_checkpoint
    from tests.distributed.layouts import built

    config = _config(checkpoint, pattern, sizes)
    options = config.checkpoint.model_copy(update={"save": save})
    config = config.model_copy(update={"checkpoint": options})
    with built(config) as (chunks, optimizer, _):
        load_checkpoint(config, checkpoint, chunks, optimizer, weights_only=True)
        tokenizer = NullTokenizer(VOCAB_SIZE)
        checkpointer = Checkpointer(
            config, chunks, optimizer, tokenizer, lambda *_: None, carried=read_carried(checkpoint)
        )
        checkpointer.save(Progress(), wait=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_bytes_from_every_layout(name: str, model: tuple[Path, Path], tmp_path: Path) -> None:
    """Optimizer states and padding left out, every layout's checkpoint is transformers' file.

    What lay beside it goes from checkpoint to checkpoint.
    """
    hugging_face, imported = model
    ranks, pattern, sizes = LAYOUTS[name]
    run_distributed(load_and_save, ranks, imported, pattern, sizes, tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "hf", ExportOptions())
    expected = (hugging_face / "model.safetensors").read_bytes()
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == expected
    assert (tmp_path / "hf" / "LICENSE").read_text() == "free"


class Backend(enum.Enum):
    """Stands for the enumerations among Megatron-LM's arguments."""

    FLASH = 1


MEGATRON_ARGUMENTS = {
    "hybrid_layer_pattern": None, "hybrid_override_pattern": PATTERN, "hidden_size": 48,
    "ffn_hidden_size": 56, "num_attention_heads": 4, "group_query_attention": True,
    "num_query_groups": 2, "kv_channels": 10, "mamba_num_heads": 8, "mamba_head_dim": 6,
    "mamba_state_dim": 5, "mamba_num_groups": 2, "squared_relu": True, "swiglu": False,
    "normalization": "RMSNorm", "norm_epsilon": 1e-5, "position_embedding_type": "none",
    "untie_embeddings_and_output_weights": True, "add_bias_linear": False, "vocab_size": VOCAB_SIZE,
    "padded_vocab_size": PADDED, "make_vocab_size_divisible_by": 16, "num_experts": 8,
    "moe_ffn_hidden_size": 20, "moe_router_topk": 3, "moe_shared_expert_intermediate_size": 28,
    "moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 1.7,
    "moe_router_enable_expert_bias": True, "seq_length": 64, "consumed_train_samples": 1000,
    "attention_backend": Backend.FLASH, "params_dtype": torch.float32,
}  # fmt: skip
# Of Megatron-LM, with words in their names that layers have, and read by none.
NOT_OF_LAYERS = {
    "bias_gelu_fusion", "dino_norm_last_layer", "log_params_norm", "no_persist_layer_norm",
    "use_rotary_position_embeddings",  # says position_embedding_type
}  # fmt: skip
# Norms of layers without Transformer Engine: (place in ours, name there).
LOCAL_NORMS = (
    ("mixer.in_proj.layer_norm_weight", "norm.weight"),
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
)


def _as_megatron_lm(imported: Path, folder: Path, arguments: dict[str, Any]) -> Path:
    """A checkpoint as Megatron-LM makes it without Transformer Engine, each expert on its own."""
    folder.mkdir()
    writer = CheckpointWriter(folder, 1)
    with CheckpointReader(imported) as reader:
        for name in reader.tensors:
            whole = reader.read(name)
            parts = {name: whole}
            for ours, theirs in LOCAL_NORMS:
                if name.endswith(ours):
                    parts = {name.removesuffix(ours) + theirs: whole}
            if ".experts.experts." in name:
                before, _, after = name.partition(".experts.experts.")
                parts = {f"{before}.experts.experts.{i}.{after}": e for i, e in enumerate(whole)}
            for part, tensor in parts.items():
                writer.declare(part, tuple(tensor.shape), tensor.dtype)
                writer.write_part(0, part, 0, tuple(tensor.shape), [tensor.contiguous()])
    writer.finish({})
    common = {"args": argparse.Namespace(**arguments), "iteration": 500}
    torch.save(common, folder / "common.pt")
    return folder


def test_megatron_lm_checkpoint(model: tuple[Path, Path], tmp_path: Path) -> None:
    """Without a config of ours, the arguments describe the model; local names are known."""
    hugging_face, imported = model
    checkpoint = _as_megatron_lm(imported, tmp_path / "megatron", MEGATRON_ARGUMENTS)
    export(checkpoint, tmp_path / "hf", ExportOptions())
    expected = (hugging_face / "model.safetensors").read_bytes()
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == expected
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| Steps | 500 |" in card and "| Tokens seen | 64,000 |" in card


def test_a_true_size_that_megatron_lm_does_not_say() -> None:
    """All rows are words then, as they were for Megatron-LM's loss."""
    for said, words in ((VOCAB_SIZE, VOCAB_SIZE), (None, PADDED)):
        model = run_values(MEGATRON_ARGUMENTS | {"vocab_size": said})["model"]
        assert model["vocab_size"] == words
        assert model["make_vocab_size_divisible_by"] == PADDED


def test_megatron_lm_arguments_without_counterpart(
    model: tuple[Path, Path], tmp_path: Path
) -> None:
    """What the arguments ask for and no field of ours can say is refused by name, all at once."""
    arguments = MEGATRON_ARGUMENTS | {"mtp_num_layers": 1, "qk_layernorm": True}
    checkpoint = _as_megatron_lm(model[1], tmp_path / "megatron", arguments)
    with pytest.raises(CheckpointError, match=r"(?s)qk_layernorm=True.*mtp_num_layers=1"):
        export(checkpoint, tmp_path / "hf", ExportOptions())


def megatron_defaults() -> dict[str, Any]:
    """All arguments of the installed Megatron-LM, as they are where nothing is typed."""
    megatron = pytest.importorskip("megatron.training.arguments")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    megatron.add_megatron_arguments(parser)
    return dict(vars(parser.parse_args([])))


def test_every_argument_of_a_model_is_read_refused_or_without_effect() -> None:
    """Those that set a field of megatron-core's config, and those of positions and activations;
    what Megatron-LM takes by itself is never refused."""
    defaults = megatron_defaults()
    layout = {field.name for field in fields(ModelParallelConfig)}
    asked = {field.name for field in fields(TransformerConfig)} - layout
    words = ("rope", "rotary", "gelu", "glu", "norm", "epsilon", "latent")
    asked |= {name for name in defaults if any(word in name.split("_") for word in words)}

    class Read(dict[str, Any]):
        """Arguments that know which of them were looked at."""

        seen: ClassVar[set[str]] = set()

        def get(self, name: str, default: Any = None) -> Any:
            self.seen.add(name)
            return super().get(name, default)

    arguments = Read(defaults | MEGATRON_ARGUMENTS)
    run_values(arguments)
    left = (asked & defaults.keys()) - arguments.seen
    names = {name for name in left if not any(fnmatch(name, each) for each in WITHOUT_EFFECT)}
    assert names == NOT_OF_LAYERS
    for each in WITHOUT_EFFECT:
        assert any(fnmatch(name, each) for name in left), f"{each} is no argument"


@pytest.mark.parametrize("name", ["layernorm_epsilon", "norm_epsilon"])
def test_the_epsilon_of_norms(name: str) -> None:
    """Under the name that the release had for it; where both are there, they agree."""
    others = {key: value for key, value in MEGATRON_ARGUMENTS.items() if key != "norm_epsilon"}
    assert run_values(others | {name: 1e-6})["model"]["layernorm_epsilon"] == 1e-6
    both = others | {"layernorm_epsilon": 1e-6, "norm_epsilon": 1e-5}
    with pytest.raises(CheckpointError, match=r"=1e-06 and norm_epsilon=1e-05 differ"):
        run_values(both)


def test_checkpoint_that_names_no_model(model: tuple[Path, Path], tmp_path: Path) -> None:
    """Without config and arguments, --model describes the model; without that it is refused."""
    hugging_face, imported = model
    checkpoint = _as_megatron_lm(imported, tmp_path / "megatron", MEGATRON_ARGUMENTS)
    (checkpoint / "common.pt").unlink()
    with pytest.raises(CheckpointError, match="--model names a preset or YAML file"):
        export(checkpoint, tmp_path / "hf", ExportOptions())
    source = str(imported / "run_config.yaml")
    export(checkpoint, tmp_path / "hf", ExportOptions(model=source))
    expected = (hugging_face / "model.safetensors").read_bytes()
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == expected
