"""Which channels an expert takes, the scale, and what is drawn."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.source_model import refuse_unsaid, source_config
from megatron_hybrid.checkpoint.writer import CheckpointWriter
from megatron_hybrid.config import ModelConfig, UpcyclingConfig, build_config, load_config
from megatron_hybrid.errors import UserError
from megatron_hybrid.model.tensor_names import NORM_NAMES, VOCABULARY_WEIGHTS
from megatron_hybrid.testing import run_distributed
from megatron_hybrid.upcycling import tensors
from megatron_hybrid.upcycling.request import Request, upcycled_config
from megatron_hybrid.upcycling.scheme import Scheme, scheme_between, weight_scale
from megatron_hybrid.upcycling.tensors import UpcycledTensors
from megatron_hybrid.upcycling.write import Upcycling
from tests.upcycling.models import dense_words, train, upcycle

# (E, G, T): scale with softmax before the top-k, and squared ReLU. Section C of the paper.
SCALES = {(8, 8, 8): 4.0, (8, 1, 1): 2.0, (8, 1, 2): 1.5874, (2, 2, 2): 1.5874, (8, 8, 16): 3.1748}


def moe(topk: int, **changes: Any) -> ModelConfig:
    """A MoE model that has what the scale depends on."""
    values = {
        "hybrid_layer_pattern": "E", "hidden_size": 8, "vocab_size": 32, "num_moe_experts": 64,
        "moe_router_topk": topk, "moe_router_pre_softmax": True,
    }  # fmt: skip
    run = {"model": values | changes, "optimizer": {"lr": 1.0}}
    return build_config(run, which=()).model


@pytest.mark.parametrize("egt", SCALES)
def test_scales_of_the_paper(egt: tuple[int, int, int]) -> None:
    """(E * G^2 / T)^(1/3), to the digits that are printed; the square root for GELU."""
    e, g, t = egt
    assert weight_scale(moe(t), e, g) == pytest.approx(SCALES[egt], abs=5e-5)
    assert weight_scale(moe(t, activation="swiglu"), e, g) == pytest.approx(SCALES[egt], abs=5e-5)
    gelu = weight_scale(moe(t, activation="gelu"), e, g)
    assert gelu == pytest.approx((e * g * g / t) ** 0.5)


def test_scale_of_the_other_router() -> None:
    """Softmax after the top-k: G in place of E * G^2 / T, whatever E and T; a factor counts."""
    after = {"moe_router_pre_softmax": False}
    assert weight_scale(moe(4, **after), 3, 8) == pytest.approx(2.0)
    assert weight_scale(moe(2, **after), 8, 8) == pytest.approx(2.0)
    factor = moe(2, moe_router_topk_scaling_factor=8.0, **after)
    assert weight_scale(factor, 8, 8) == pytest.approx(1.0)


def test_every_copy_has_every_channel_once() -> None:
    """The routed experts of one copy and the shared one hold the MLP's channels, each once."""
    scheme = Scheme((0,), 3, 4, 1, 2, 5, False, 1.0)
    assert (scheme.num_experts, scheme.channels) == (9, 20)
    for copy in range(3):
        held = list(range(20))[scheme.shared_channels]
        for expert in range(3 * copy, 3 * copy + 3):
            held += list(range(20))[scheme.channels_of(expert)]
        assert held == list(range(20))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("dense") / "run"
    line = dense_words(run_dir, "training.train_iters=1", "model.activation=swiglu")
    run_distributed(train, 1, line)
    return run_dir


def layer(dense: Path, save: Path, request: Request, **options: Any) -> dict[str, Tensor]:
    """The tensors of the second layer, and of the dense one under `dense.`."""
    _, folder = upcycle(dense, save, request, **options)
    found = {}
    for prefix, each in (("", folder), ("dense.", find_checkpoint(dense))):
        with CheckpointReader(each) as reader:
            for name in reader.tensors:
                if name.startswith("decoder.layers.1."):
                    short = name.removeprefix("decoder.layers.1.")
                    found[prefix + short.removeprefix("mlp.")] = reader.read(name)
    return found


def test_gate_and_up_are_cut_separately(dense: Path, tmp_path: Path) -> None:
    """An expert's first matrix: its channels of the gate, then of up; the second, its columns."""
    request = Request(2, 4, 3, shared_experts=1, pre_softmax=False)
    found = layer(dense, tmp_path / "moe", request)
    scale, w = 3.0 ** (1 / 3), 12
    fc1, fc2 = found["dense.linear_fc1.weight"], found["dense.linear_fc2.weight"]
    gate, up = fc1.split(48)
    for expert in range(6):
        cut = slice(w * (1 + expert % 3), w * (2 + expert % 3))
        expected = torch.cat([gate[cut], up[cut]]) * scale
        torch.testing.assert_close(found["experts.experts.linear_fc1.weight"][expert], expected)
        torch.testing.assert_close(
            found["experts.experts.linear_fc2.weight"][expert], fc2[:, cut] * scale
        )
    shared = torch.cat([gate[:w], up[:w]])
    assert torch.equal(found["shared_experts.linear_fc1.weight"], shared)
    assert torch.equal(found["shared_experts.linear_fc2.weight"], fc2[:, :w])
    norm = found["dense.linear_fc1.layer_norm_weight"]
    assert torch.equal(found["pre_mlp_layernorm.weight"], norm)


def test_router_rows_repeat_unless_there_is_noise(dense: Path, tmp_path: Path) -> None:
    """One row a copy, of the asked deviation; noise sets the experts of a copy apart by as much."""
    request = Request(40, 4, 4)
    rows = layer(dense, tmp_path / "a", request, router_std=0.5)["router.weight"].view(40, 4, -1)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert rows[:, 0].std().item() == pytest.approx(0.5, rel=0.1)
    noisy = layer(dense, tmp_path / "b", request, router_std=0.5, router_noise=0.01)
    noise = noisy["router.weight"].view(40, 4, -1) - rows
    assert noise.std().item() == pytest.approx(0.01, rel=0.1)
    zero = layer(dense, tmp_path / "c", request, router_std=0.0)["router.weight"]
    assert zero.count_nonzero() == 0


@pytest.mark.parametrize("block_bytes", [4 << 20, 600])
def test_a_share_of_the_channels_is_drawn_anew(
    block_bytes: int, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of each expert's channels, the same ones in all its matrices, as large as others;
    other ones in each expert; also where a matrix is cut into blocks of a few rows.
    """
    monkeypatch.setattr(tensors, "DRAWN_BYTES", block_bytes)
    request = Request(3, 2, 2)
    kept = layer(dense, tmp_path / "kept", request)
    drawn = layer(dense, tmp_path / "drawn", request, reinit_fraction=0.25)
    fc1, fc2 = (f"experts.experts.{name}.weight" for name in ("linear_fc1", "linear_fc2"))
    chosen = []
    for expert in range(6):
        gate, up = ((drawn[fc1][expert] != kept[fc1][expert]).all(1)).split(24)
        down = (drawn[fc2][expert] != kept[fc2][expert]).all(0)
        assert torch.equal(gate, up) and torch.equal(gate, down)
        assert gate.sum() == 6
        changed = drawn[fc1][expert].view(2, 24, -1)[:, gate]
        assert changed.std().item() == pytest.approx(kept[fc1][expert].std().item(), rel=0.15)
        chosen.append(tuple(gate.nonzero().flatten().tolist()))
    assert len(set(chosen)) == 6
    untouched = (drawn[fc1] == kept[fc1]).all(-1)
    assert untouched.sum() == 6 * 2 * 18


def test_experts_are_made_in_small_blocks(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside an MLP's matrix no thread holds more than a block, drawn anew or not."""
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 600)
    monkeypatch.setattr(tensors, "DRAWN_BYTES", 600)
    source = find_checkpoint(dense)
    with CheckpointReader(source) as reader:
        config = source_config(reader, None)
        moe = upcycled_config(config, Request(3, 2, 2), Path("moe"), [])
        scheme = scheme_between(config.model, moe.model, scale_weights=True)
        for options in (UpcyclingConfig(), UpcyclingConfig(reinit_fraction=0.5)):
            made = UpcycledTensors(reader, config.model, moe.model, scheme, options, seed=1)
            for each in (each for each in made.made.values() if each.kind == "experts"):
                pieces = list(made.expert(each, made.matrix(each), 1))
                assert max(piece.nbytes for piece in pieces) <= 600
                assert sum(len(piece) for piece in pieces) == each.shape[1]


def test_another_seed_draws_others(dense: Path, tmp_path: Path) -> None:
    """What is drawn follows from training.seed, and nothing else."""
    request, name = Request(2, 4, 4), "decoder.layers.1.mlp.router.weight"
    config, folder = upcycle(dense, tmp_path, request)
    with CheckpointReader(folder) as reader:
        written = reader.read(name)
    with CheckpointReader(find_checkpoint(dense)) as reader:
        before = source_config(reader, None).model
        scheme = scheme_between(before, config.model, scale_weights=True)

        def drawn(seed: int) -> Tensor:
            options = UpcyclingConfig()
            made = UpcycledTensors(reader, before, config.model, scheme, options, seed)
            return made.whole(made.made[name])

        assert torch.equal(drawn(config.training.seed), written)
        assert not torch.equal(drawn(config.training.seed + 1), written)


def without_transformer_engine(dense: Path, folder: Path) -> None:
    """Write a dense checkpoint's weights with the names of norms that stand by themselves, as
    Megatron-LM without Transformer Engine saves them; no config of ours beside them.
    """
    others = {names[0]: names[1] for names in NORM_NAMES.values() if len(names) > 1}
    folder.mkdir(parents=True)
    writer = CheckpointWriter(folder, 1)
    with CheckpointReader(find_checkpoint(dense)) as reader:
        for name, info in reader.tensors.items():
            if name.startswith("optimizer."):
                continue
            end = next((ours for ours in others if name.endswith(ours)), None)
            renamed = name if end is None else name.removesuffix(end) + others[end]
            writer.declare(renamed, info.shape, info.dtype)
            writer.write_part(0, renamed, 0, info.shape, [reader.read(name).contiguous()])
    writer.finish({})
    arguments = argparse.Namespace(consumed_train_samples=28)
    torch.save({"args": arguments, "iteration": 7}, folder / "common.pt")


def test_moe_layers_that_are_there_keep_their_routing() -> None:
    """How tokens are routed is said for all MoE layers at once, so another way is refused."""
    dense = moe(2, hybrid_layer_pattern="-E", ffn_hidden_size=16, moe_ffn_hidden_size=8)
    same = dense.model_copy(update={"hybrid_layer_pattern": "EE"})
    assert scheme_between(dense, same, scale_weights=True).layers == (0,)
    other = same.model_copy(update={"moe_router_topk": 4, "moe_router_pre_softmax": False})
    with pytest.raises(UserError) as caught:
        scheme_between(dense, other, scale_weights=True)
    assert "model.moe_router_topk=4, in the dense checkpoint 2" in str(caught.value)
    assert "model.moe_router_pre_softmax=false, in the dense checkpoint true" in str(caught.value)


def test_factors_of_mlps_are_refused(tmp_path: Path) -> None:
    """Also where the MoE model says none, as it must: its experts would be other functions."""
    sizes = {"activation": "swiglu", "ffn_hidden_size": 16, "moe_ffn_hidden_size": 8}
    dense = moe(2, hybrid_layer_pattern="-", mlp_multipliers=[0.5, 0.3], **sizes)
    into = moe(2, hybrid_layer_pattern="E", **sizes)
    match = r"has model.mlp_multipliers=\[0.5, 0.3\], and experts have no factors"
    with pytest.raises(UserError, match=match):
        scheme_between(dense, into, scale_weights=True)
    words = ["model.activation=swiglu", "model.mlp_multipliers=[0.5, 0.3]"]
    run = load_config(dense_words(tmp_path, *words))
    with pytest.raises(UserError, match=match):
        upcycled_config(run, Request(2, 4, 4), tmp_path, ["model.mlp_multipliers=[1, 1]"])


def test_vocabularies_are_compared_by_their_rows() -> None:
    """Megatron-LM's checkpoints know how many rows there are, not what they were a multiple of."""
    sizes = {"ffn_hidden_size": 16, "moe_ffn_hidden_size": 8}
    dense = moe(
        2, hybrid_layer_pattern="-", vocab_size=64, make_vocab_size_divisible_by=64, **sizes
    )
    padded = {"vocab_size": 50, "make_vocab_size_divisible_by": 32}
    into = moe(2, hybrid_layer_pattern="E", **padded, **sizes)
    assert scheme_between(dense, into, scale_weights=True).layers == (0,)
    other = into.model_copy(update={"make_vocab_size_divisible_by": 52})
    with pytest.raises(UserError, match="padded_vocab_size=52, in the dense checkpoint 64"):
        scheme_between(dense, other, scale_weights=True)


def test_a_vocabulary_may_be_padded_otherwise(dense: Path, tmp_path: Path) -> None:
    """To more rows, which are 0, and back to fewer: the words' rows are the dense run's."""
    one = Request(2, 4, 4, layers=(2,))
    upcycle(dense, tmp_path / "more", one, "model.make_vocab_size_divisible_by=48")
    two = Request(2, 4, 4, layers=(4,))
    upcycle(tmp_path / "more", tmp_path / "fewer", two, "model.make_vocab_size_divisible_by=32")
    held = []
    for folder in (dense, tmp_path / "more", tmp_path / "fewer"):
        with CheckpointReader(find_checkpoint(folder)) as reader:
            held.append([reader.read(name) for name in VOCABULARY_WEIGHTS])
    for words, more, fewer in zip(*held, strict=True):
        assert torch.equal(fewer, words)
        assert torch.equal(more[: len(words)], words)
        assert more.shape == (96, 32) and not more[len(words) :].any()


def test_what_megatron_lm_does_not_say_must_be_typed(tmp_path: Path) -> None:
    """Its checkpoints hold no learning rate, batch size or length for us to go on with."""
    with pytest.raises(UserError, match=r"set optimizer.lr; training.global_batch_size; "):
        refuse_unsaid(tmp_path, [])
    with pytest.raises(UserError, match=r"set training.global_batch_size, or name"):
        refuse_unsaid(tmp_path, ["--lr", "1e-4", "training.train_tokens=5"])
    refuse_unsaid(tmp_path, ["--lr", "1e-4", "--train-iters", "5", "--global-batch-size", "8"])


def test_of_a_run_its_own_checkpoints_are_the_newest(dense: Path, tmp_path: Path) -> None:
    """A run that was upcycled into its own folder has trained since: that is what is taken."""
    _, folder = upcycle(dense, tmp_path / "moe", Request(2, 4, 4))
    assert find_checkpoint(tmp_path / "moe") == folder
    shutil.copytree(dense / "checkpoints", tmp_path / "moe" / "checkpoints")
    assert find_checkpoint(tmp_path / "moe").parent == tmp_path / "moe" / "checkpoints"


def test_a_checkpoint_of_megatron_lm(dense: Path, tmp_path: Path) -> None:
    """Norms under other names, no config, no counters of ours: the same weights at its step."""
    source = tmp_path / "megatron" / "iter_0000007"
    without_transformer_engine(dense, source)
    request = Request(2, 4, 4)
    with CheckpointReader(find_checkpoint(dense)) as reader:
        model = source_config(reader, None)
    without = ["data.tokenizer_type=sentencepiece"]
    config = upcycled_config(model, request, tmp_path / "moe", without)
    with pytest.raises(UserError, match=r"needs data.tokenizer_model; it is unset"):
        Upcycling(source, model, config, UpcyclingConfig())
    config = upcycled_config(model, request, tmp_path / "moe", [])
    done = Upcycling(source, model, config, UpcyclingConfig()).write(tmp_path / "moe")
    assert done.folder.name == "iter_0000007"
    with CheckpointReader(done.folder) as reader:
        assert reader.common["progress"] == {
            "iteration": 7, "consumed_samples": 28, "loss_average": None,
            "schedule_start_samples": 28, "objective_state": {},
        }  # fmt: skip
    (source / "common.pt").unlink()
    torch.save({"iteration": 7}, source / "common.pt")
    counted = Upcycling(source, model, config, UpcyclingConfig()).progress
    assert counted is not None
    assert counted.consumed_samples == 7 * config.training.global_batch_size
    varied = config.training.model_copy(update={"batch_size_schedule": ((0, 2), (99, 4))})
    config = config.model_copy(update={"training": varied})
    with pytest.raises(UserError, match="how many samples were read in its 7 steps"):
        Upcycling(source, model, config, UpcyclingConfig())
    _, expected = upcycle(dense, tmp_path / "other", request)
    with CheckpointReader(done.folder) as one, CheckpointReader(expected) as two:
        assert one.tensors.keys() == two.tensors.keys()
        assert all(torch.equal(one.read(name), two.read(name)) for name in one.tensors)


def test_what_an_import_leaves_out_is_made_all_the_same(tmp_path: Path) -> None:
    """Of a dense checkpoint without sums of its files comes one that has them, unless told so."""
    dense = load_config(dense_words(tmp_path / "dense", "checkpoint.verify_integrity=false"))
    request = Request(2, 1, 2, None, 0, True)
    for words, writes in ([], True), (["checkpoint.verify_integrity=false"], False):
        made = upcycled_config(dense, request, tmp_path / "moe", words)
        assert made.checkpoint.verify_integrity is writes
