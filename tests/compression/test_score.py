"""`compress score`: importance by the whole model's places, the same in every layout."""

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.compression.request import Request
from megatron_hybrid.compression.scores import fingerprint_of, read_scores
from megatron_hybrid.testing import run_distributed
from tests import warm
from tests.compression.models import edited, parent_of, parent_words, prune, zeroed
from tests.compression.test_prune import TOLERANCE, all_logits
from tests.upcycling.models import as_words, loaded, train

IDLE = torch.tensor([1, 2, 5, 7, 20, 21, 30, 47])  # channels of an MLP
HIDDEN = torch.tensor([0, 3, 9, 31])
HEADS = [1, 2]  # one of each group
OF_HEADS = [*range(16, 48)]
ZERO = {
    "decoder.layers.1.mlp.linear_fc1.weight": zeroed(IDLE),
    "decoder.layers.5.mlp.linear_fc1.weight": zeroed(IDLE),
    "decoder.layers.3.mlp.shared_experts.linear_fc1.weight": zeroed(range(3, 11)),
    "decoder.layers.3.mlp.router.expert_bias": lambda bias: bias[1].fill_(-1e9),
    **{
        f"decoder.layers.{layer}.mixer.{name}.x": zeroed(OF_HEADS)
        for layer in (0, 4)
        for name in ("in_proj.weight", "conv1d.weight", "conv1d.bias")
    },
    "decoder.layers.2.self_attention.linear_proj.weight": zeroed(range(32)),
    "embedding.word_embeddings.weight": zeroed(HIDDEN, 1),
    "decoder.layers.0.mixer.out_proj.weight": zeroed(HIDDEN),
    "decoder.layers.4.mixer.out_proj.weight": zeroed(HIDDEN),
    "decoder.layers.1.mlp.linear_fc2.weight": zeroed(HIDDEN),
    "decoder.layers.5.mlp.linear_fc2.weight": zeroed(HIDDEN),
    "decoder.layers.3.mlp.shared_experts.linear_fc2.weight": zeroed(HIDDEN),
    "decoder.layers.3.mlp.experts.experts.linear_fc2.weight": zeroed(HIDDEN, 1),
}
LAYOUTS = {
    "TP2": ["--nproc", "2", "parallel.tensor_model_parallel_size=2"],
    "PP2": ["--nproc", "2", "parallel.pipeline_model_parallel_size=2", "--batch-size", "3"],
    "CP2": ["--nproc", "2", "parallel.context_parallel_size=2"],
    "EP2": ["--nproc", "2", "parallel.expert_model_parallel_size=2", "--batch-size", "3"],
}


def scored(run: Path, path: Path, *words: str) -> Path:
    """The command, as it is typed."""
    line = [warm.python(), "-m", "megatron_hybrid.cli", "compress", "score", str(run)]
    done = subprocess.run(
        [*line, "--output", str(path), "training.eval_iters=2", *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "of 8 samples" in done.stdout
    return path


def values(run: Path, path: Path) -> dict[str, Tensor]:
    source, config = parent_of(run)
    with CheckpointReader(source) as reader:
        return dict(read_scores(path, config.model, fingerprint_of(reader)).values)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a model in which some of everything is 0."""
    folder = tmp_path_factory.mktemp("scored")
    run_distributed(train, 1, parent_words(folder / "run"))
    return edited(folder / "run", folder / "zero", ZERO).parent


def test_what_is_zero_goes_first_and_nothing_is_lost(parent: Path, tmp_path: Path) -> None:
    """Scored and pruned of what is 0 in it, a model has the same logits; every layout scores the
    same, with any micro batch, whose last one is not full."""
    file = scored(parent, tmp_path / "one", "--picture", str(tmp_path / "it.png"))
    one = values(parent, file)
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    for name, idle in (
        ("layers.2.ffn", IDLE), ("layers.6.ffn", IDLE), ("hidden", HIDDEN),
        ("layers.4.experts", torch.tensor([1])), ("layers.4.shared", torch.arange(3, 11)),
        ("depth", torch.tensor([2])),
    ):  # fmt: skip
        order = one[name].argsort()
        assert torch.equal(order[: len(idle)].sort().values, idle), name
        assert one[name][order[len(idle)]] > 1e-4 > one[name][idle].max() * 10, name
    request = Request(
        num_layers=5, hidden_size=28,
        sizes={"mamba_num_heads": 2, "ffn_hidden_size": 40, "num_moe_experts": 3,
               "moe_shared_expert_intermediate_size": 16},
    )  # fmt: skip
    epsilon = f"model.layernorm_epsilon={1e-5 * 32 / 28}"
    config, folder = prune(parent, tmp_path / "pruned", request, epsilon, scores=file)
    assert config.model.hybrid_layer_pattern == "M-EM-"
    source, before = parent_of(parent)
    models = [(as_words(before, tmp_path), source, 0.5), (as_words(config, tmp_path), folder, 1.0)]
    expected, found = run_distributed(all_logits, 1, models)[0]
    assert (found - expected).abs().max() <= TOLERANCE * expected.std()
    for layout, words in LAYOUTS.items():
        again = values(parent, scored(parent, tmp_path / layout, *words))
        for name, ours in again.items():
            largest = one[name].abs().max()
            assert (ours - one[name]).abs().max() <= 1e-5 * largest, (layout, name)


def formulas(line: list[str], checkpoint: Path) -> list[tuple[str, Tensor, Tensor]]:
    """On a rank: scores of two samples, of which the second is counted, and what they must be."""
    seen: dict[str, Tensor] = {}
    with loaded(line, checkpoint) as (config, model):
        from megatron_hybrid.compression.activations import Activations

        activations = Activations(config, [model])
        every = model.decoder.layers
        every[1].mlp.linear_fc2.register_forward_pre_hook(
            lambda _, arguments: seen.update(ffn=arguments[0][:, 1])
        )
        every[2].self_attention.linear_proj.register_forward_pre_hook(
            lambda _, arguments: seen.update(heads=arguments[0][:, 1])
        )
        for place in (1, 2, 3):
            every[place].register_forward_pre_hook(
                lambda _, __, named, p=place: seen.update({f"in{p}": named["hidden_states"][:, 1]}),
                with_kwargs=True,
            )
        every[0].mixer.in_proj.register_forward_hook(
            lambda _, __, out: seen.update(x=out[0][:, 1, 64:128])
        )
        tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            model(tokens, torch.arange(16).expand_as(tokens), None)
        activations.end_micro_batch(torch.tensor([False, True]), 16)
        found, samples = activations.collect()
    assert samples == 1
    before, after = seen["in1"], seen["in2"]
    cosine = (before * after).sum(1) / (before.norm(dim=1) * after.norm(dim=1))
    return [
        ("ffn", found["layers.2.ffn"], seen["ffn"].abs().mean(0)),
        (
            "heads",
            found["layers.3.query_heads"],
            seen["heads"].abs().mean(0).view(4, 8).norm(dim=1),
        ),
        ("x", found["layers.1.mamba"], seen["x"].abs().mean(0).view(4, 16)),
        ("depth", found["depth"][1], (1 - cosine).mean()),
    ]  # fmt: skip


def test_formulas(parent: Path, tmp_path: Path) -> None:
    """Against the papers' formulas, of what other hooks saw."""
    source, before = parent_of(parent)
    for name, found, expected in run_distributed(formulas, 1, as_words(before, tmp_path), source)[
        0
    ]:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, msg=name)


def test_what_cannot_be_scored(parent: Path, tmp_path: Path) -> None:
    """A file that is something else, a layout that does not fit: in a sentence, before any work."""
    (tmp_path / "notes").write_text("mine")
    for words, said in (
        ([f"--output={tmp_path / 'notes'}"], "is there, and holds no scores"),
        ([f"--output={tmp_path}"], "is a folder; name the file"),
        ([f"--output={tmp_path / 'notes' / 'x'}"], "notes/x could not be written"),
        (["--output=x", "--nproc=3", "parallel.tensor_model_parallel_size=3"],
         "parallel.tensor_model_parallel_size=3"),
        (["--output=x", "optimizer.lr=1"], "optimizer.lr is not for evaluation to change"),
    ):  # fmt: skip
        done = subprocess.run(
            [warm.python(), "-m", "megatron_hybrid.cli", "compress", "score", str(parent), *words],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 1
        assert said in done.stderr
    assert (tmp_path / "notes").read_text() == "mine"
