"""`compress prune`: the smaller model is the masked parent, whole or not there at all."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from megatron_hybrid.checkpoint import files
from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.compression.report import print_report
from megatron_hybrid.compression.request import Request
from megatron_hybrid.compression.scores import Scores, fingerprint_of, shapes
from megatron_hybrid.compression.write import PROVENANCE_FILE, Pruning
from megatron_hybrid.config import load_config, rules
from megatron_hybrid.errors import UserError
from megatron_hybrid.testing import run_distributed
from megatron_hybrid.testing.distributed import RankError
from tests.compression.models import (
    edited,
    parent_of,
    parent_words,
    prune,
    tensors,
    zeroed,
)
from tests.training.runs import losses, words
from tests.upcycling.models import as_words, dying, logits, train

TOLERANCE = 1e-5  # of the logits' standard deviation, in fp32
ALL = Request(
    hidden_size=32,
    sizes={
        "ffn_hidden_size": 48, "mamba_num_heads": 4, "mamba_head_dim": 16,
        "num_attention_heads": 4, "num_moe_experts": 4, "moe_shared_expert_intermediate_size": 24,
    },
)  # fmt: skip
SMALL = Request(
    drop_layers=(2,), hidden_size=24,
    sizes={
        "mamba_num_heads": 2, "mamba_head_dim": 8, "num_attention_heads": 2, "num_moe_experts": 2,
        "moe_shared_expert_intermediate_size": 12,
    },
    of_layers=[((6,), "ffn_hidden_size", 20)],
)  # fmt: skip


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("compression") / "parent"
    run_distributed(train, 1, parent_words(run))
    return run


def scores_of(run: Path, path: Path, **edits: Tensor) -> Path:
    """A score file of drawn numbers, but for `edits`, of names with `_` for `.`."""
    source, config = parent_of(run)
    draws = torch.Generator().manual_seed(3)
    values = {
        name: torch.rand(shape, generator=draws) for name, shape in shapes(config.model).items()
    }
    for name in values:
        values[name] = edits.get(name.replace(".", "_"), values[name])
    with CheckpointReader(source) as reader:
        Scores(values, fingerprint_of(reader), {"checkpoint": str(source)}).save(path)
    return path


def test_all_of_it_is_the_same_bytes(parent: Path, tmp_path: Path) -> None:
    """Pruned to what it has, every tensor and the model's config are the parent's."""
    config, folder = prune(parent, tmp_path / "pruned", ALL)
    source, before = parent_of(parent)
    theirs, ours = tensors(source), tensors(folder)
    assert [*theirs] == [*ours]
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert config.model == before.model


def mamba(layer: int, channels: list[int]) -> dict[str, Any]:
    """Edits after which these channels of a mixer are 0 before its gated norm."""
    name = f"decoder.layers.{layer}.mixer.conv1d"
    return {f"{name}.weight.x": zeroed(channels), f"{name}.bias.x": zeroed(channels)}


HEADS = [*range(16, 32), *range(48, 64)]  # channels of heads 1 and 3, the last of each group
DIMS = [head * 16 + channel for head in range(4) for channel in range(8, 16)]
HIDDEN = [*range(24, 32)]
MASKED: dict[str, tuple[Request, dict[str, Any], list[str], float]] = {
    "MLP channels": (
        Request(sizes={"ffn_hidden_size": 20}),
        {f"decoder.layers.{n}.mlp.linear_fc2.weight": zeroed(range(20, 48), 1) for n in (1, 5)},
        [], 1.0,
    ),
    "shared expert": (
        Request(sizes={"moe_shared_expert_intermediate_size": 8}),
        {"decoder.layers.3.mlp.shared_experts.linear_fc2.weight": zeroed(range(8, 24), 1)}, [], 1.0,
    ),
    "query heads": (
        Request(sizes={"num_attention_heads": 2}),
        {"decoder.layers.2.self_attention.linear_proj.weight":
            zeroed([*range(8, 16), *range(24, 32)], 1)}, [], 1.0,
    ),
    "experts that are not chosen": (
        Request(sizes={"num_moe_experts": 3}),
        {"decoder.layers.3.mlp.router.expert_bias": lambda bias: bias[3].fill_(-1e9)}, [], 1.0,
    ),
    "Mamba heads": (
        Request(sizes={"mamba_num_heads": 2}), mamba(0, HEADS) | mamba(4, HEADS), [], 0.5,
    ),
    "Mamba channels": (
        Request(sizes={"mamba_head_dim": 8}), mamba(0, DIMS) | mamba(4, DIMS), [], 0.5,
    ),
    "embedding channels": (
        Request(hidden_size=24),
        {"embedding.word_embeddings.weight": zeroed(HIDDEN, 1),
         **{f"decoder.layers.{layer}.{name}.weight": zeroed(HIDDEN) for layer, name in (
            (0, "mixer.out_proj"), (4, "mixer.out_proj"), (1, "mlp.linear_fc2"),
            (5, "mlp.linear_fc2"), (2, "self_attention.linear_proj"),
            (3, "mlp.shared_experts.linear_fc2"))},
         "decoder.layers.3.mlp.experts.experts.linear_fc2.weight": zeroed(HIDDEN, 1)},
        [f"model.layernorm_epsilon={1e-5 * 32 / 24}"], 1.0,
    ),
}  # fmt: skip


def all_logits(models: list[tuple[list[str], Path, float]]) -> list[Tensor | None]:
    """On a rank: logits of models, each with the epsilon of its gated norm times a factor."""
    from megatron_hybrid.layers import mamba2

    usual, found = mamba2.GATED_NORM_EPS, []
    for line, checkpoint, factor in models:
        mamba2.GATED_NORM_EPS = usual * factor
        found.append(logits(line, checkpoint))
    return found


@pytest.mark.parametrize("activation", ["squared_relu", "swiglu"])
def test_equals_the_masked_parent(activation: str, parent: Path, tmp_path: Path) -> None:
    """The smaller model's logits are those of the parent with what was cut at 0. Of embedding
    channels the epsilon of the norms that makes it exact is typed; of the gated norm's it is the
    masked parent's that is made so, as the smaller one's cannot be said."""
    cases = [*MASKED]
    if activation == "swiglu":  # whose first matrix has two halves
        parent, cases = tmp_path / "gated", ["MLP channels", "shared expert", "embedding channels"]
        run_distributed(train, 1, parent_words(parent, "model.activation=swiglu"))
    before = as_words(parent_of(parent)[1], tmp_path)
    models: list[tuple[list[str], Path, float]] = [(before, find_checkpoint(parent), 1.0)]
    for what in cases:
        request, edits, more, factor = MASKED[what]
        masked = edited(parent, tmp_path / f"{what} masked", edits)
        config, folder = prune(parent, tmp_path / what, request, *more)
        models += [(before, masked, factor), (as_words(config, tmp_path), folder, 1.0)]
    whole, *rest = run_distributed(all_logits, 1, models)[0]
    for what, expected, found in zip(cases, rest[::2], rest[1::2], strict=True):
        assert (found - expected).abs().max() <= TOLERANCE * expected.std(), what
        assert (found - whole).abs().max() > 100 * TOLERANCE * expected.std(), what


def test_layers_that_do_nothing(parent: Path, tmp_path: Path) -> None:
    """Without layers whose outputs are 0 the logits are the same; the others are renumbered."""
    idle = edited(parent, tmp_path / "idle", {
        "decoder.layers.1.mlp.linear_fc2.weight": zeroed(range(32)),
        "decoder.layers.4.mixer.out_proj.weight": zeroed(range(32)),
    })  # fmt: skip
    config, folder = prune(idle.parent, tmp_path / "pruned", Request(drop_layers=(2, 5)))
    assert config.model.hybrid_layer_pattern == "M*E-"
    dense, _ = prune(idle.parent, tmp_path / "dense", Request(drop_layers=(4,)))
    assert (dense.model.num_moe_experts, dense.model.moe_router_score_function) == (None, "softmax")
    before = parent_of(parent)[1]
    models = [(as_words(before, tmp_path), idle, 1.0), (as_words(config, tmp_path), folder, 1.0)]
    expected, found = run_distributed(all_logits, 1, models)[0]
    assert (found - expected).abs().max() <= TOLERANCE * expected.std()


def test_the_most_important_stay(parent: Path, tmp_path: Path) -> None:
    """By the scores: heads of Mamba and attention within their groups, the same channels of all
    heads, and the rest as they rank; the file says what stayed."""
    heads = torch.tensor([4.0, 3.0, 2.0, 1.0])  # the best two are of one group
    file = scores_of(
        parent, tmp_path / "scores", layers_1_mamba=heads[:, None] * torch.arange(16.0),
        layers_3_query_heads=heads, layers_4_experts=heads.flip(0), hidden=torch.arange(32.0),
        depth=torch.tensor([1.0, 0.1, 1.0, 1.0, 1.0, 1.0]),
    )  # fmt: skip
    request = Request(num_layers=5, hidden_size=SMALL.hidden_size, sizes=SMALL.sizes)
    _, folder = prune(parent, tmp_path / "pruned", request, scores=file)
    said = json.loads((folder / PROVENANCE_FILE).read_text())
    assert said["layers"] == [1, 3, 4, 5, 6]
    assert said["hidden"] == "8-31"
    assert said["of_layers"]["1"] == {"mamba_channels": "8-15", "mamba_heads": "0, 2"}
    assert said["of_layers"]["3"] == {"query_heads": "0, 2"}
    assert said["of_layers"]["4"]["experts"] == "2-3"
    theirs, ours = tensors(find_checkpoint(parent)), tensors(folder)
    x = theirs["decoder.layers.0.mixer.in_proj.weight.x"].view(4, 16, 32)[::2, 8:, 8:]
    assert torch.equal(ours["decoder.layers.0.mixer.in_proj.weight.x"], x.reshape(16, 24))
    expert = theirs["decoder.layers.3.mlp.experts.experts.linear_fc1.weight"][2:, :, 8:]
    assert torch.equal(ours["decoder.layers.2.mlp.experts.experts.linear_fc1.weight"], expert)


def test_it_trains_in_every_layout(parent: Path, tmp_path: Path) -> None:
    """With unlike layers, on one rank, with TP2 and with PP2: the same logits, and the same losses
    of the steps after it."""
    config, folder = prune(parent, tmp_path / "pruned", SMALL, "training.train_iters=3")
    assert config.model.layers
    expected = None
    for name, ranks, more in (
        ("one", 1, []),
        ("TP2", 2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
        ("PP2", 2, ["parallel.pipeline_model_parallel_size=2",
                    "model.hybrid_layer_pattern=M*|EM-"]),
        ("EP2", 2, ["parallel.expert_model_parallel_size=2"]),
    ):  # fmt: skip
        run = tmp_path / name
        line = as_words(config, tmp_path, *more, f"run_dir={run}",
                        f"checkpoint.load={folder.parent}")  # fmt: skip
        assert run_distributed(train, ranks, line)[0] == "finished"
        found = torch.tensor(losses(run))
        assert len(found) == 2
        expected = found if expected is None else expected
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("preset", "request_", "pattern", "parameters"),
    [
        # Model-Optimizer's tutorial, 9B to 7B; Minitron-SSM's chosen candidate.
        ("nemotron_nano_9b_v2",
         Request(drop_layers=(43, 44, 45, 46, 47, 48, 50, 52), hidden_size=4352,
                 sizes={"mamba_num_heads": 120, "ffn_hidden_size": 13824}),
         "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-MMMM-M-", 7_000_000_000),
        ("nemotron_h_8b", Request(hidden_size=3072,
                                  sizes={"mamba_num_heads": 112, "ffn_hidden_size": 12288}),
         None, 4_489_223_040),
    ],
)  # fmt: skip
def test_published_sizes(
    preset: str, request_: Request, pattern: str | None, parameters: int
) -> None:
    """The patterns and counts that the papers print."""
    from megatron_hybrid.compression.sizes import kept_layers, pruned_config
    from megatron_hybrid.model.counts import count_parameters

    config = load_config([preset, "model.vocab_size=131072"], which=rules.NO_FILES)
    kept = kept_layers(config.model, request_, set(request_.drop_layers))
    one_rank = ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"]
    found = pruned_config(config, request_, kept, Path("out"), one_rank).model
    if pattern is not None:
        assert found.hybrid_layer_pattern.replace("|", "") == pattern
        assert round(count_parameters(found).total, -7) == parameters
    else:
        assert count_parameters(found).total == parameters


def prune_and_die(run: Path, save: Path, at: float | str) -> None:
    """On a rank: prune, and be killed when so much is written, or before it has its name."""
    source, config = parent_of(run)
    Pruning(source, config, SMALL, save, keep_first=True).write(dying(at))


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0, "publish"])
def test_killed_it_leaves_nothing_that_loads(at: float | str, parent: Path, tmp_path: Path) -> None:
    """Killed at any moment there is no checkpoint to load; the next try is none the worse."""
    save = tmp_path / "pruned"
    with pytest.raises(RankError, match="SIGKILL"):
        run_distributed(prune_and_die, 1, parent, save, at)
    assert files.latest_checkpoint(save) is None
    prune(parent, save, SMALL)
    assert sorted(path.name for path in save.iterdir()) == [
        "iter_0000001", "latest_checkpointed_iteration.txt",
    ]  # fmt: skip


def test_it_goes_to_hugging_face_and_back(tmp_path: Path) -> None:
    """What was cut of a model that a family holds comes back byte for byte; unlike layers, which
    no family holds, are refused by name."""
    from checkpoints_converter.errors import ConversionError
    from checkpoints_converter.export import ExportOptions, export
    from checkpoints_converter.importing import ImportOptions, import_model

    run = tmp_path / "run"
    dense = ["model.hybrid_layer_pattern=M-*M-", "model.ffn_hidden_size=48",
             "model.num_attention_heads=4", "model.num_query_groups=2",
             "training.train_iters=1"]  # fmt: skip
    run_distributed(train, 1, words(run, *dense))
    sizes = {"mamba_num_heads": 2, "mamba_head_dim": 8, "num_attention_heads": 2}
    whole = {**sizes, "ffn_hidden_size": 20}
    _, folder = prune(run, tmp_path / "pruned", Request(hidden_size=24, sizes=whole))
    export(folder, tmp_path / "hf", ExportOptions())
    back = import_model(tmp_path / "hf", tmp_path / "back", ImportOptions()).folder
    theirs, ours = tensors(folder), tensors(back)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name][: len(tensor)], tensor), name
    unlike = Request(of_layers=[((2,), "ffn_hidden_size", 20)])
    _, folder = prune(run, tmp_path / "unlike", unlike)
    with pytest.raises(ConversionError, match="ffn_hidden_size=20"):
        export(folder, tmp_path / "no", ExportOptions())


def test_modules_of_prediction_are_left_out(tmp_path: Path) -> None:
    """Where that is typed; the embedding that is the output's, too, is the masked parent's."""
    run, null = tmp_path / "run", "model.mtp_num_layers=null"
    tied = ["model.hybrid_layer_pattern=M-*", "model.mtp_num_layers=1",
            "model.mtp_hybrid_override_pattern=*-", "training.train_iters=1",
            "model.untie_embeddings_and_output_weights=false"]  # fmt: skip
    run_distributed(train, 1, words(run, *tied))
    request = Request(drop_layers=(2,), hidden_size=24)
    with pytest.raises(UserError, match=r"are not cut yet; allowed: model\.mtp_num_layers=null"):
        prune(run, tmp_path / "pruned", request)
    epsilon = f"model.layernorm_epsilon={1e-5 * 32 / 24}"
    config, folder = prune(run, tmp_path / "pruned", request, null, epsilon)
    masked = edited(run, tmp_path / "masked", {
        "embedding.word_embeddings.weight": zeroed(HIDDEN, 1),
        "decoder.layers.0.mixer.out_proj.weight": zeroed(HIDDEN),
        "decoder.layers.1.mlp.linear_fc2.weight": zeroed(range(32)),
        "decoder.layers.2.self_attention.linear_proj.weight": zeroed(HIDDEN),
    })  # fmt: skip
    before = as_words(parent_of(run)[1], tmp_path)
    models = [(before, masked, 1.0), (as_words(config, tmp_path), folder, 1.0)]
    expected, found = run_distributed(all_logits, 1, models)[0]
    assert (found - expected).abs().max() <= TOLERANCE * expected.std()


def test_the_report_says_what_is_left_to_train(parent: Path, tmp_path: Path) -> None:
    """Where the config's run is over at the parent's step, so that pretrain would do nothing."""
    source, config = parent_of(parent)
    steps = config.training.train_iters
    for words_, said in (([], "; NOTHING IS LEFT of"), (["training.train_iters=99"], " of 396")):
        pruning = Pruning(source, config, SMALL, tmp_path / "out", words_, keep_first=True)
        out = io.StringIO()
        print_report(pruning, Console(file=out))
        assert f"goes on at step {steps}, sample {steps * 4}{said}" in out.getvalue()
