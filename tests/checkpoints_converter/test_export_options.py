"""What an export can be asked for, and what the file system may do to it."""

import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from checkpoints_converter.export import ExportOptions, export
from checkpoints_converter.importing import ImportOptions, import_model
from megatron_hybrid.errors import UserError
from megatron_hybrid.testing import run_distributed
from tests.checkpoints_converter.peer_models import nemotron_h, saved

SHARD_BYTES = 40_000
FP32 = ("A_log", "D", "dt_bias", "e_score_correction_bias")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model in several shards of Hugging Face's format, and the checkpoint that it came from."""
    folder = tmp_path_factory.mktemp("pair")
    source = saved(nemotron_h("M-ME*-"), folder / "source")
    imported = import_model(source, folder / "checkpoints", ImportOptions()).folder
    export(imported, folder / "shards", ExportOptions(max_shard_bytes=SHARD_BYTES))
    return folder / "shards", imported


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an exported folder, by transformers' own reader."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def test_no_shard_is_larger_than_asked(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Tensors of a shard together, or a single one; all shards hold what one file does."""
    export(pair[1], tmp_path / "one", ExportOptions())
    shards = sorted(pair[0].glob("*.safetensors"))
    assert len(shards) > 3
    for path in shards:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= SHARD_BYTES
    one, several = weights(tmp_path / "one"), weights(pair[0])
    assert one.keys() == several.keys()
    assert all(torch.equal(one[name], several[name]) for name in one)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_dtype(dtype: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Every weight is rounded once, but for what decides about decay and routing."""
    export(pair[1], tmp_path / "out", ExportOptions(dtype=dtype))
    asked = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for name, tensor in weights(tmp_path / "out").items():
        expected = weights(pair[0])[name]
        assert tensor.dtype == (torch.float32 if name.endswith(FP32) else asked), name
        assert torch.equal(tensor, expected.to(tensor.dtype))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(asked).removeprefix("torch.")


def test_in_place_shards_come_whole_and_config_last(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Under their own names while the export runs: each loads, and config.json is not there yet."""
    out, seen = tmp_path / "out", set()

    def advance(done: int, total: int) -> None:
        for path in out.glob("*.safetensors"):
            seen.add(path.name)
            assert load_file(path)
            assert not (out / "config.json").exists()

    options = ExportOptions(max_shard_bytes=SHARD_BYTES, in_place=True, threads=1)
    export(pair[1], out, options, advance)
    assert len(seen) > 2
    assert (out / "config.json").is_file()


def _shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def _flip_a_bit(folder: Path) -> None:
    content = bytearray(_shard(folder).read_bytes())
    content[-1] ^= 1
    _shard(folder).write_bytes(content)


def _other_values(folder: Path) -> None:
    """A shard of another model, which another program wrote: no fingerprint, same shapes."""
    tensors = {name: tensor + 1 for name, tensor in load_file(_shard(folder)).items()}
    save_file(tensors, _shard(folder), metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [_flip_a_bit, _other_values])
def test_other_bytes_than_were_exported(
    damage: Callable[[Path], None], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """What was exported carries checksums of its tensors: other values are refused."""
    bad = shutil.copytree(pair[0], tmp_path / "bad")
    damage(bad)
    with pytest.raises(UserError, match=r"is damaged, or of another model: the checksum of"):
        import_model(bad, tmp_path / "out", ImportOptions())
    assert list((tmp_path / "out").glob("iter_*")) == []


def test_what_a_killed_replacement_left_is_in_nobodys_way(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Killed while it removed the old model, it left `.out.old.part`: --force works again."""
    out = tmp_path / "out"
    export(pair[1], out, ExportOptions())
    shutil.copytree(out, tmp_path / ".out.old.part")
    export(pair[1], out, ExportOptions(force=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def on_a_full_disk(checkpoint: Path, out: Path, source: Path, back: Path) -> list[str]:
    """On a rank: the errors of both directions where no file may grow past 20 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    errors = []
    for run in (
        lambda: export(checkpoint, out, ExportOptions(threads=1)),
        lambda: import_model(source, back, ImportOptions(threads=1)),
    ):
        with pytest.raises(UserError) as caught:
            run()
        errors.append(str(caught.value))
    return errors


def test_a_full_disk(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """One line in both directions, and nothing that loads."""
    out, back = tmp_path / "out", tmp_path / "back"
    errors = run_distributed(on_a_full_disk, 1, pair[1], out, pair[0], back)[0]
    for target, said in zip((out, back), errors, strict=True):
        assert said.startswith(f"{target} could not be written: ") and "File too large" in said
    assert not out.exists()
    assert list(back.glob("iter_*")) == []


def test_places_where_no_folder_can_be(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below a file, a symbolic link, the working folder: refused, or done, without a traceback."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        export(pair[1], tmp_path / "file" / "out", ExportOptions())
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="symbolic link"):
        export(pair[1], tmp_path / "link", ExportOptions())
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    export(pair[1], Path(), ExportOptions(in_place=True))
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("time_step_limit", [0.0], "time_step_limit"),
        ("time_step_limit", "abc", "time_step_limit"),
        ("time_step_limit", [None, 1], "time_step_limit"),
        ("time_step_min", "x", "time_step_min='x' must be a number"),
        ("attention_dropout", "x", "attention_dropout='x' must be a number"),
        ("routed_scaling_factor", "x", "routed_scaling_factor='x' must be a number"),
        ("mlp_hidden_act", ["a"], "mlp_hidden_act"),
        ("mlp_hidden_act", {}, "mlp_hidden_act"),
        ("layers_block_type", 5, "layers_block_type=5 must be a list"),
        ("model_type", ["x"], "model_type"),
        ("model_type", "zamba2", "its attention layers share their weights"),
        ("hidden_size", "x", "hidden_size='x' must be a whole number"),
    ],
)
def test_fields_of_the_wrong_kind(
    field: str, value: Any, named: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """A config.json with nonsense in it is refused with the field, not with a traceback."""
    bad = shutil.copytree(pair[0], tmp_path / "bad")
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError) as caught:
        import_model(bad, tmp_path / "out", ImportOptions())
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"vocab_size": None}, "model.vocab_size is not set"),
        (
            {"vocab_size": 60, "make_vocab_size_divisible_by": 61},
            r"holds another model than --model .*vocab_size=60, in the checkpoint 61",
        ),
        ({"num_attention_heads": None}, "model.num_attention_heads is not set"),
        ({"mamba_num_groups": 3}, "model.mamba_num_groups=3 must divide"),
        ({"hidden_size": 8}, "holds another model:\n  - model.hidden_size=8, in the checkpoint"),
        ({"layernorm_epsilon": 0.5}, r"holds another model than --model .*epsilon=0.5 \(there "),
        ({"moe_router_topk_scaling_factor": 3.0}, "holds another model than --model .*factor=3.0"),
    ],
)
def test_the_model_that_is_named_is_the_checkpoints(
    change: dict[str, Any], problem: str | None, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Beside a checkpoint that says itself which model it holds, --model is held against that;
    what it leaves open is no assertion's, and how the run was trained is not the file's to say.
    """
    values = yaml.safe_load((pair[1] / "run_config.yaml").read_text())
    values["model"] |= change
    values["model"]["kv_channels"] = values["model"]["kv_channels"] or 8
    named = tmp_path / "named.yaml"
    named.write_text(yaml.safe_dump(values))
    if problem is None:
        length = values["data"]["seq_length"]
        values["data"]["seq_length"] = 4 * length
        named.write_text(yaml.safe_dump(values))
        export(pair[1], tmp_path / "out", ExportOptions(model=str(named)))
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert written["max_position_embeddings"] == length
        return
    with pytest.raises(UserError, match=problem):
        export(pair[1], tmp_path / "out", ExportOptions(model=str(named)))
    assert not (tmp_path / "out").exists()
