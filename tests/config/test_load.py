"""Where a config comes from and what wins: presets, files, typed words, checkpoints."""

import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hybrid.commands.plan import UNNEEDED
from megatron_hybrid.config import (
    CONFIG_FILE,
    TRACKER_FILE,
    RunConfig,
    build_config,
    lengths,
    load_config,
    presets,
    rules,
)
from megatron_hybrid.config.describe import fields, plain_type, shown
from megatron_hybrid.config.tracker import FIRST_FOLDER
from megatron_hybrid.errors import ConfigError
from tests.config import GOOD

MOCK = ("--mock-data", "--tokenizer-type", "null", "--vocab-size", "131072")


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def store_checkpoint(folder: Path, config: RunConfig) -> None:
    write(folder / TRACKER_FILE, "20\n")
    write(folder / "iter_0000020" / CONFIG_FILE, config.to_yaml())


def test_typed_wins_over_file_over_preset(tmp_path: Path) -> None:
    """Each layer overrides fields of the one below and leaves the others."""
    file = write(
        tmp_path / "run.yaml",
        "preset: tiny\noptimizer:\n  lr: 5e-4\n  clip_grad: 2.0\nmodel:\n  hidden_size: 256\n",
    )
    config = load_config([file, *GOOD[1:], "optimizer.clip_grad=3.0", "--hidden-size", "512"])
    assert config.preset == "tiny"
    assert (config.optimizer.lr, config.optimizer.clip_grad) == (5e-4, 3.0)
    assert config.model.hidden_size == 512
    assert config.model.mamba_state_dim == 32  # of the preset


def test_later_word_wins() -> None:
    """A script may append its caller's words to its own."""
    config = load_config([*GOOD, "--lr", "1e-3", "optimizer.lr=2e-3", "--min-lr=0", "--lr=4e-3"])
    assert config.optimizer.lr == 4e-3


def test_typed_length_replaces_the_presets() -> None:
    """train_tokens of a preset gives way to train_iters, which says the same thing."""
    config = load_config(["nemotron_h_8b", *MOCK, "--train-iters", "10"])
    assert (config.training.train_iters, config.training.train_tokens) == (10, None)
    assert config.optimizer.lr_decay_tokens == 15 * 10**12  # the schedule stays the real one


def test_derived_fields_are_explicit() -> None:
    """A resolved config holds no null where a field follows from others."""
    values = {
        "model": {
            "hybrid_layer_pattern": "M*|-E|M*|-E",
            "hidden_size": 256,
            "num_attention_heads": 8,
            "num_moe_experts": 4,
            "vocab_size": 512,
        },
        "parallel": {"pipeline_model_parallel_size": 2},
        "data": {"mock_data": True, "tokenizer_type": "null"},
        "training": {"train_iters": 10, "global_batch_size": 4},
        "optimizer": {"lr": 1e-3},
        "run_dir": "somewhere",
    }
    config = build_config(values)
    model = config.model
    assert (model.ffn_hidden_size, model.moe_ffn_hidden_size) == (1024, 1024)
    assert (model.num_query_groups, model.kv_channels, model.mamba_num_heads) == (8, 32, 8)
    assert config.parallel.virtual_pipeline_model_parallel_size == 2
    assert config.parallel.expert_tensor_parallel_size == 1
    assert config.checkpoint.save == Path("somewhere/checkpoints")


def test_fields_that_do_not_apply_stay_null() -> None:
    """No heads without attention, no expert width without experts, no VPP without stages."""
    words = (*GOOD, "--hybrid-layer-pattern", "M-|M-", "--moe-aux-loss-coeff", "0")
    unset = ("num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
    others = (
        "model.num_attention_heads=null", "model.num_query_groups=null",
        "model.moe_router_score_function=softmax",
    )  # fmt: skip
    config = load_config([*words, *(f"model.{name}=null" for name in unset), *others])
    assert config.model.kv_channels is None
    assert config.model.moe_ffn_hidden_size is None
    assert config.parallel.virtual_pipeline_model_parallel_size is None


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_survive_yaml(name: str, tmp_path: Path) -> None:
    """Every preset is a valid run on its own ranks, and its YAML reads back to the same config."""
    config = load_config([name, *MOCK])
    layout = config.parallel
    ranks = max(layout.tensor_model_parallel_size, layout.expert_model_parallel_size)
    assert config == load_config([name, *MOCK], world_size=ranks, has_cuda=True)
    assert load_config([write(tmp_path / "run.yaml", config.to_yaml())]) == config


def test_presets_follow_the_papers() -> None:
    """Tokens a step, iterations and schedule: cosine for Nemotron-H, WSD for Nano v2."""
    big = load_config(["nemotron_h_56b", *MOCK])
    assert big.training.global_batch_size * big.data.seq_length == 6_291_456
    assert lengths(big).train_tokens / 6_291_456 == pytest.approx(3_178_914.4, abs=0.1)
    small = load_config(["nemotron_h_8b", *MOCK])
    assert lengths(small).train_tokens / 6_291_456 == pytest.approx(2_384_185.8, abs=0.1)
    assert big.optimizer.lr_decay_style == "cosine"
    assert big.optimizer.min_lr == pytest.approx(0.01 * big.optimizer.lr)
    nano = load_config(["nemotron_nano_12b_v2", *MOCK])
    assert (nano.optimizer.lr_decay_style, nano.optimizer.lr) == ("WSD", 4.5e-4)
    for config in (big, nano):
        expected = (0.8 / config.model.hidden_size) ** 0.5
        assert config.model.init_method_std == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(
    ("words", "world_size"),
    [
        ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
        ("--context-parallel-size 2", 2),
        ("--expert-model-parallel-size 2", 2),
        ("--pipeline-model-parallel-size 2", 2),
        ("--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2", 4),
    ],
)
def test_tiny_fits_every_layout(words: str, world_size: int) -> None:
    """The sizes of `tiny` divide by 2 in every dimension."""
    load_config([*GOOD, *words.split()], world_size=world_size, has_cuda=False)


def test_checkpoint_describes_the_run(tmp_path: Path) -> None:
    """`--load DIR` alone takes the stored config; typed words override it."""
    stored = load_config([*GOOD, "--lr", "7e-4"])
    store_checkpoint(tmp_path / "ckpt", stored)
    config = load_config(["--load", str(tmp_path / "ckpt"), "--train-iters", "999"])
    assert config.optimizer.lr == 7e-4
    assert config.training.train_iters == 999
    assert config.checkpoint.load == tmp_path / "ckpt"
    assert config.model == stored.model


def test_code_that_a_checkpoint_names_is_typed_again(tmp_path: Path) -> None:
    """Callbacks and an objective of the user's own are not taken from a stored config; one of ours
    is, with its options."""
    own = ["training.callbacks=[a.b:C]", "training.objective=a.b:D"]
    store_checkpoint(tmp_path, load_config([*GOOD, *own]))
    load = ["--load", str(tmp_path)]
    with pytest.raises(ConfigError) as caught:
        load_config(load)
    kept = "which a checkpoint does not bring, as it is code; type"
    assert caught.value.problems == [
        f"checkpoint.load={tmp_path} is of a run with training.callbacks=[a.b:C], {kept} "
        "training.callbacks=[a.b:C] to go on so, or training.callbacks=[]",
        f"checkpoint.load={tmp_path} is of a run with training.objective=a.b:D, {kept} "
        "training.objective=a.b:D to go on so, or training.objective=pretraining",
    ]
    assert load_config([*load, *own]).training.callbacks == ("a.b:C",)
    assert not load_config([*load, "training.callbacks=[]", own[1]]).training.callbacks
    ours = ["training.objective=masked_diffusion", "training.objective_options.mask_token_id=3"]
    store_checkpoint(tmp_path, load_config([*GOOD, *ours]))
    config = load_config(load)
    assert config.training.objective == "masked_diffusion"
    assert config.training.objective_options == {"mask_token_id": 3}


def test_a_run_that_begins_with_an_import_writes_sums(tmp_path: Path) -> None:
    """from-hf writes none of whole files; that is no choice of the run's, as one of a run is."""
    stored = load_config([*GOOD, "checkpoint.verify_integrity=false"])
    write(tmp_path / TRACKER_FILE, "0\n")
    write(tmp_path / FIRST_FOLDER / CONFIG_FILE, stored.to_yaml())
    load = ["--load", str(tmp_path)]
    assert load_config(load).checkpoint.verify_integrity
    assert not load_config([*load, "checkpoint.verify_integrity=false"]).checkpoint.verify_integrity
    store_checkpoint(tmp_path, stored)
    assert not load_config(load).checkpoint.verify_integrity


def test_any_layout_takes_up_a_checkpoint(tmp_path: Path) -> None:
    """VPP and the save folder, stored because they followed from others, follow the new ones."""
    words = ["--hybrid-layer-pattern", "M-|M*|ME|M-", "--pipeline-model-parallel-size", "2"]
    stored = load_config([*GOOD, *words])
    assert stored.parallel.virtual_pipeline_model_parallel_size == 2
    store_checkpoint(tmp_path, stored)
    load = ["--load", str(tmp_path)]
    for size in (1, 4):
        config = load_config([*load, "--pipeline-model-parallel-size", str(size)])
        assert config.parallel.virtual_pipeline_model_parallel_size is None
    assert load_config([*load, "--run-dir", "new"]).checkpoint.save == Path("new/checkpoints")
    assert load_config(load).parallel.virtual_pipeline_model_parallel_size == 2


def test_a_source_given_beside_load_is_taken(tmp_path: Path) -> None:
    """With a preset or a file named, the stored config is not read."""
    store_checkpoint(tmp_path, load_config([*GOOD, "--lr", "7e-4"]))
    config = load_config([*GOOD, "--load", str(tmp_path)])
    assert config.optimizer.lr == 3e-3


def test_flags_alone_describe_a_run() -> None:
    """No preset and no file: a Megatron-LM script's flags are enough."""
    words = (
        "--hybrid-override-pattern M-M* --hidden-size 256 --num-attention-heads 4 --swiglu --bf16 "
        "--seq-length 128 --train-samples 100 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer "
        "--vocab-size 512"
    )
    config = load_config(words.split())
    assert config.model.hybrid_layer_pattern == "M-M*"
    assert config.model.activation == "swiglu"
    assert config.preset is None


def test_inputs_may_be_named_later() -> None:
    """A dry run needs no data; looking at a config needs no files either."""
    load_config(["nemotron_h_8b"], which=rules.DRY_RUN)
    load_config(["nemotron_h_8b", "--data-path", "nowhere"], which=rules.NO_FILES)
    with pytest.raises(ConfigError, match="'nowhere' is incomplete"):
        load_config(["nemotron_h_8b", "--data-path", "nowhere"], which=rules.DRY_RUN)


def test_lengths_round_up() -> None:
    """Lengths are tokens, rounded up to whole samples, whatever they were given in."""
    config = load_config([*GOOD, "--train-tokens", "10e3", "--lr-warmup-tokens", "257"])
    found = lengths(config)  # 256 tokens a sample
    assert (found.unit_tokens, found.train_tokens) == (256, 40 * 256)
    assert (found.warmup_tokens, found.decay_tokens) == (2 * 256, 40 * 256)
    fraction = lengths(load_config([*GOOD, "--lr-warmup-fraction", "0.25"]))
    assert fraction.warmup_tokens == 240 * 16 // 4 * 256


def test_vocabulary_of_the_tokenizer() -> None:
    """The tokenizer's size fills a null, and must fit into a given one."""
    config = load_config(GOOD)
    assert config.with_vocab_size(200).model.vocab_size == 256
    with pytest.raises(ConfigError, match=r"model.vocab_size=256 must hold .* 300 tokens"):
        config.with_vocab_size(300)
    unset = load_config(["tiny"], which=rules.NO_FILES)
    assert unset.with_vocab_size(300).model.vocab_size == 300


text = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=20)
tricky = st.sampled_from(
    ["null", "~", "true", "no", "1e5", "8e-4", "010", ".5", "1_000", "a: b", "# x"]
)


def test_both_readers_of_yaml_agree() -> None:
    """What is read in C is what Python's reader, which bounds nesting, makes of it."""
    from megatron_hybrid.config import yaml_text

    root = Path(__file__).parents[2]
    texts = [path.read_text("utf-8") for path in root.rglob("*.yaml") if ".venv" not in path.parts]
    assert len(texts) > 20
    texts += [
        "a: [8e-4, 1e5, .5, 0x1f, 07, no, yes, ~, null, True, .inf, -.nan, 1_000, 2026-01-01]"
    ]
    for text in texts:
        python = yaml_text.yaml.load(text, Loader=yaml_text._Loader)
        assert repr(yaml_text.parse_yaml(text)) == repr(python)
    for deep in ("- " * 5000 + "a", "[" * 5000, "".join(" " * n + "a:\n" for n in range(600))):
        with pytest.raises(ValueError, match="nested"):
            yaml_text.parse_yaml(deep)


@settings(max_examples=60, deadline=None)
@given(
    run_dir=text | tricky,
    prefixes=st.lists(
        st.tuples(st.floats(1e-9, 1e9, allow_nan=False), text | tricky),
        min_size=1,
        max_size=3,
        unique_by=lambda pair: os.path.normpath(pair[1]),
    ),
    lr=st.floats(1e-12, 10.0),
    window=st.none() | st.tuples(st.integers(1, 2**31 - 1), st.just(0)),
    tokens=st.integers(1, 10**14),
)
def test_yaml_round_trip(run_dir: str, prefixes, lr: float, window, tokens: int) -> None:  # type: ignore[no-untyped-def]
    """Whatever the values, the YAML of a config reads back to an equal config."""
    base = load_config(["tiny"], which=rules.NO_FILES)
    # As a config holds them: a `~` that is the home folder is in none.
    run_dir = os.path.expanduser(run_dir)  # noqa: PTH111
    prefixes = [(weight, os.path.expanduser(prefix)) for weight, prefix in prefixes]  # noqa: PTH111
    config = base.model_copy(
        update={
            "run_dir": Path(run_dir),
            "model": base.model.model_copy(update={"window_size": window}),
            "data": base.data.model_copy(update={"data_path": tuple(prefixes)}),
            "training": base.training.model_copy(
                update={"train_iters": None, "train_tokens": tokens}
            ),
            "optimizer": base.optimizer.model_copy(
                update={"lr": lr, "min_lr": 0.0, "lr_warmup_fraction": 0.0}
            ),
        }
    )
    from megatron_hybrid.config.yaml_text import parse_yaml

    assert build_config(parse_yaml(config.to_yaml()), which=rules.NO_FILES) == config


def test_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is what the shell means by it, in a file and in `field=~/x`, which no shell expands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = [name for name, field in fields().items() if plain_type(field) is Path]
    assert len(paths) >= 6
    typed = [f"{name}=~/x" for name in paths if name not in ("checkpoint.load", "upcycling.from")]
    for more in ("data.data_path=[[1, ~/a]]", "checkpoint.load=~/x", "upcycling.from=~/x"):
        values = load_config([*GOOD, *typed, more], which=()).model_dump(mode="json")
        told = json.dumps(values)
        assert "~" not in told
        assert told.count(f'"{tmp_path}/') == len(typed) + 1
    source = write(tmp_path / "run.yaml", "data: {sources: {web: {path: [~/a, ~/b_*]}}}")
    config = load_config([source, *GOOD[1:], "preset=tiny"], which=())
    assert config.data.sources["web"].path == (f"{tmp_path}/a", f"{tmp_path}/b_*")
    with pytest.raises(ConfigError, match=f"checkpoint.load={tmp_path}/x: no such folder"):
        load_config(["--load", "~/x"])


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ([], (10**6, None, 1e-4)),
        (["training.train_tokens=640"], (None, 640, 1e-4)),
        (["training.train_iters=3", "optimizer.lr=2e-3"], (3, None, 2e-3)),
    ],
)
def test_stand_ins(typed: list[str], expected: tuple[int | None, int | None, float]) -> None:
    """Of what a command does not go by, where nothing sets it, nor what stands in its place."""
    line = ["model.hybrid_layer_pattern=-", "model.hidden_size=64", "model.vocab_size=64", *typed]
    found = load_config(line, which=rules.NO_FILES, stand_in=UNNEEDED)
    length = found.training.train_iters, found.training.train_tokens
    assert (*length, found.optimizer.lr) == expected


def test_two_presets_are_one_too_many() -> None:
    """Neither is passed over; nor is one that a command with a config of its own is given."""
    assert load_config([*GOOD, "preset=tiny"]).preset == "tiny"
    with pytest.raises(ConfigError, match="preset=nemotron_h_8b beside tiny, which is one too"):
        load_config([*GOOD, "preset=nemotron_h_8b"])
    base = load_config(GOOD).model_dump(mode="json")
    with pytest.raises(ConfigError, match="preset=tiny is not for this command to change"):
        load_config(["preset=tiny"], base=base)


@pytest.mark.parametrize("typed", ["[4, 0]", "null", "[true, null]", "{'a': [false]}", "1e-05"])
def test_values_are_shown_as_one_types_them(typed: str) -> None:
    """Within lists and mappings too: what a message shows can be put into a config."""
    value = yaml.safe_load(typed)
    as_kept = tuple(value) if isinstance(value, list) else value
    assert shown(as_kept) == shown(value)
    assert yaml.safe_load(shown(value)) == value
