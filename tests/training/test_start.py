"""What is settled from files alone, before the engine starts and before any rank does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hybrid.checkpoint.carried import carried_on, write_carried
from megatron_hybrid.checkpoint.saved_config import FUNCTION_FIELDS, SHAPE_FIELDS, TRAINING_FIELDS
from megatron_hybrid.config import TRACKER_FILE, RunConfig, load_config
from megatron_hybrid.config.describe import shown
from megatron_hybrid.config.effects import EFFECTS
from megatron_hybrid.data.batches import Span, Steps
from megatron_hybrid.data.datasets import plan_data
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.saved_files import DATA_FILES_FILE, files_json
from megatron_hybrid.data.saved_plan import DATA_PLAN_FILE, SavedPlan
from megatron_hybrid.data.tokenizer import NullTokenizer
from megatron_hybrid.errors import UserError
from megatron_hybrid.training import start
from megatron_hybrid.training.batch_sizes import check_batch_sizes
from tests.training.phased import corpora, corpus, phased_words
from tests.training.runs import words


@pytest.fixture
def sources(tmp_path: Path) -> str:
    return corpora(tmp_path, "web", "code", "math")


def test_a_run_is_opened_without_torch(sources: str, tmp_path: Path) -> None:
    """The launcher may look at checkpoint, files and plan in no time."""
    code = (
        "import json, sys\n"
        "from megatron_hybrid.config import load_config\n"
        "from megatron_hybrid.training.start import open_run\n"
        "_, _, start = open_run(load_config(json.loads(sys.argv[1])), 2)\n"
        "assert start.data.plan.samples == 112\n"
        "heavy = {'torch', 'megatron', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    line = json.dumps(phased_words(tmp_path / "run", sources))
    done = subprocess.run([sys.executable, "-c", code, line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_launcher_refuses_before_any_rank_starts(sources: str, tmp_path: Path) -> None:
    """What no rank could read is one error of the launcher; nothing is written."""
    more = ["data.max_epochs=0.2", "checkpoint.save_interval=1"]
    line = phased_words(tmp_path / "run", sources, *more)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_hybrid.cli", "pretrain", *line, "--nproc", "2"],
        env=os.environ | {"PYTHONFAULTHANDLER": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: data.max_epochs=0.2: the run reads source ")
    assert "rank" not in done.stderr
    assert not (tmp_path / "run").exists()


def batch_config(*more: str) -> RunConfig:
    sizes = ["training.global_batch_size=8", "training.micro_batch_size=1"]
    return load_config(words(Path("nowhere"), *sizes, *more))


@pytest.mark.parametrize(
    ("more", "world_size", "steps", "problem"),
    [
        ([], 4, Steps([Span(0, 36, 32)], ((0, 8),)), None),
        (["training.micro_batch_size=2"], 4, Steps([Span(0, 36, 32)], ((0, 8),)),
         "global batches of 4 samples lie ahead .* a multiple of training.micro_batch_size=2 "
         r"\* data-parallel size=4 = 8; allowed for the product: 1, 2, 4"),
        ([], 3, Steps([Span(0, 30, 32), Span(30, 40, 64)], ((0, 6), (1000, 5))),
         "global batches of 4 samples lie ahead .* allowed for the product: 1, 2"),
        (["model.hybrid_layer_pattern=M*|-M|*M|-*",
          "parallel.pipeline_model_parallel_size=2"], 2, Steps([Span(0, 27, 32)], ((0, 8),)),
         r"of 3 samples .*data-parallel size=1 \* parallel.pipeline_model_parallel_size=2 = 2;"),
    ],
)  # fmt: skip
def test_batches_that_ranks_cannot_divide(
    more: list[str], world_size: int, steps: Steps, problem: str | None
) -> None:
    """Each size that occurs, those of short batches too, is a whole number of micro-batches."""
    if problem is None:
        check_batch_sizes(batch_config(*more), steps, 0, world_size)
        return
    with pytest.raises(UserError, match=problem):
        check_batch_sizes(batch_config(*more), steps, 0, world_size)


def test_what_was_read_is_no_matter(tmp_path: Path) -> None:
    """Batches before the checkpoint need not fit the ranks that go on from it."""
    steps = Steps([Span(0, 9, 32), Span(9, 41, 64)], ((0, 9), (100, 8)))
    with pytest.raises(UserError, match="of 9 samples"):
        check_batch_sizes(batch_config(), steps, 0, 4)
    check_batch_sizes(batch_config(), steps, 9, 4)


def test_files_of_a_tokenizer_that_is_none_of_ours(tmp_path: Path) -> None:
    """A model folder's vocab.json does not travel beside the tokenizer that the run was given."""
    folder = tmp_path / "iter_0000000"
    others = {"config.json": b"{}", "LICENSE": b"free"}
    write_carried(folder, others)
    assert carried_on(folder, NullTokenizer(64)) == others
    write_carried(folder, {"vocab.json": b"{}", "tokenizer_config.json": b"{}"})
    assert carried_on(folder, NullTokenizer(64)) == {}


CHANGED: dict[str, str] = {
    "window_size": "[8,0]", "attn_mask_type": "no_mask", "position_embedding_type": "rope",
    "rotary_base": "20000", "rotary_percent": "0.5", "normalization": "LayerNorm",
    "layernorm_epsilon": "1e-3", "moe_router_topk": "1", "moe_router_score_function": "sigmoid",
    "moe_router_pre_softmax": "true", "moe_router_topk_scaling_factor": "2.5",
    "moe_router_num_groups": "2", "moe_router_group_topk": "1",
    "ssm_multipliers": "[1,1,2,1,1]", "mlp_multipliers": "[1,2]",
    **dict.fromkeys(
        (
            "key_multiplier", "ssm_in_multiplier", "ssm_out_multiplier", "attention_in_multiplier",
            "attention_out_multiplier", "embedding_multiplier", "lm_head_multiplier",
        ),
        "2.0",
    ),
}  # fmt: skip


def test_every_field_of_the_function_is_compared() -> None:
    """With the weights of a checkpoint: refused where shapes tell, and else said."""
    function = {
        name.removeprefix("model.")
        for name, effect in EFFECTS.items()
        if effect == "function" and name.startswith("model.")
    }
    # Of `model.layers`, every layer's sizes are, under the fields' own names.
    assert function - {"vocab_size", "layers"} == {*SHAPE_FIELDS, *FUNCTION_FIELDS} - {
        "padded_vocab_size"
    }
    assert not set(SHAPE_FIELDS) & set(FUNCTION_FIELDS)
    assert CHANGED.keys() == set(FUNCTION_FIELDS)


@pytest.mark.parametrize("name", [name for name in CHANGED if name != "normalization"])
def test_the_same_tensors_as_another_function(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every way to begin says so, once, with both values: going on, from another run's, anew."""
    rope = ["model.position_embedding_type=rope"] if name.startswith("rotary") else []
    line = words(tmp_path / "run", "model.hybrid_layer_pattern=M*E", "model.num_moe_experts=4",
                 *rope)  # fmt: skip
    saved = load_config(line)
    folder = tmp_path / "run" / "checkpoints" / "iter_0000001"
    folder.mkdir(parents=True)
    (folder / "run_config.yaml").write_text(saved.to_yaml())
    changed = load_config([*line, f"model.{name}={CHANGED[name]}"], which=())
    assert getattr(changed.model, name) != getattr(saved.model, name)
    with caplog.at_level("WARNING", "megatron_hybrid"):
        start._note_other_functions(saved, folder)
        assert not caplog.messages
        start._note_other_functions(changed, folder)
    (said,) = caplog.messages
    assert said.startswith(f"note: {folder} was trained as another function of the same weights: ")
    assert f"model.{name}={shown(getattr(changed.model, name))} " in said
    assert f"(there {shown(getattr(saved.model, name))})" in said
    caplog.clear()
    with caplog.at_level("WARNING", "megatron_hybrid"):
        start._note_other_functions(load_config([*line, "training.objective=a:B"]), folder)
    assert caplog.messages == [f"note: {folder} minimised pretraining; training.objective=a:B"]
    caplog.clear()
    with caplog.at_level("WARNING", "megatron_hybrid"):
        more = ["training.objective_options={least_ratio: 0.5}"]
        start._note_other_functions(load_config([*line, *more], which=()), folder)
    assert caplog.messages == [
        f"note: {folder} minimised pretraining with training.objective_options={{}}; now "
        "{'least_ratio': 0.5}"
    ]


def test_another_beginning_of_a_run_that_has_begun(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same words again say nothing; another checkpoint to start from is not read, and told."""
    for name in ("a", "b"):
        (tmp_path / name / "iter_0000001").mkdir(parents=True)
        (tmp_path / name / TRACKER_FILE).write_text("1")
    line = words(tmp_path / "run", f"checkpoint.load={tmp_path}/a")
    folder = tmp_path / "run" / "checkpoints" / "iter_0000001"
    folder.mkdir(parents=True)
    (folder / "run_config.yaml").write_text(load_config(line, which=()).to_yaml())
    with caplog.at_level("WARNING", "megatron_hybrid"):
        for same in (line, words(tmp_path / "run")):
            start._note_other_beginning(load_config(same, which=()), folder)
        assert not caplog.messages
        other = [f"checkpoint.load={tmp_path}/b", "checkpoint.finetune=true"]
        start._note_other_beginning(load_config([*line, *other], which=()), folder)
    (said,) = caplog.messages
    assert said.startswith(f"note: this run goes on from its own {folder}; checkpoint.load=")
    assert f"{tmp_path}/b" in said and "checkpoint.finetune=true" in said


# In megatron-core's order, of the fields that say which tokens come: a change that other samples
# come of, and what is told; and those by which the same ones come, or that this order refuses.
OTHER_SAMPLES = {
    "data.data_path=[[1,{other}]]": "data.data_path=[[1.0, '{other}']], in the checkpoint [[",
    "data.data_path=[[1,{same}],[1,{other}]]": "data.data_path=[[0.5, ",
    "data.split=70,20,10": "data.split=70,20,10, in the checkpoint 80,20,0",
    "data.seq_length=64": "data.seq_length=[64], in the checkpoint [32]",
    "training.seed=7": "training.seed=7, in the checkpoint 1234",
    "data.sample_order=plan": "data.sample_order=plan, in the checkpoint megatron",
    "data.mock_data=true": "data.mock_data=true, in the checkpoint false",
    "training.train_iters=150": "training.train_iters=150, in the checkpoint 20\n"
    "  - megatron-core's order shuffles {same} over 4 passes, in the checkpoint over 1 pass, by",
    "training.global_batch_size=64": "training.global_batch_size=64, in the checkpoint 4\n  - meg",
}
SAME_SAMPLES = {
    "data.data_path=[[3,{same}]]", "data.split=8,2,0", "training.train_iters=24",
    "training.global_batch_size=2", "training.eval_iters=3", "data.num_workers=1",
    "data.data_cache_path=cache", "training.train_samples=90", "data.packed_documents=true",
}  # fmt: skip
# Sources, phases and caps have no place in this order; the tokenizer is compared by itself.
ELSEWHERE = {
    "data.sources", "data.phases", "data.max_epochs", "data.block_tokens", "data.tokenizer_type",
    "data.tokenizer_model", "training.batch_size_schedule", "training.train_tokens",
}  # fmt: skip


def test_other_samples_in_megatron_s_order_are_refused(tmp_path: Path) -> None:
    """As those of a plan are: every field that says which tokens come, with both values."""
    paths = {name: corpus(tmp_path / name, number) for number, name in enumerate(["same", "other"])}
    line = words(
        tmp_path / "run", "data.mock_data=false", "data.sample_order=megatron",
        f"data.data_path=[[1,{paths['same']}]]", "data.split=80,20,0", "training.train_iters=20",
    )  # fmt: skip
    (tmp_path / "run_config.yaml").write_text(load_config(line).to_yaml())
    NullTokenizer(64).save_copy(tmp_path)

    def resumed(change: str) -> None:
        config = load_config([*line, change.format(**paths)], which=())
        start._resumed_plan(config, NullTokenizer(64), tmp_path, upcycle=False)

    for change in SAME_SAMPLES:
        resumed(change)
    for change, told in OTHER_SAMPLES.items():
        with pytest.raises(UserError, match="has counted other samples") as refused:
            resumed(change)
        assert told.format(**paths) in str(refused.value)
    named = {change.partition("=")[0] for change in {*OTHER_SAMPLES, *SAME_SAMPLES}} | ELSEWHERE
    assert {name for name, effect in EFFECTS.items() if effect == "input"} <= named


def test_files_made_anew_in_megatron_s_order(tmp_path: Path) -> None:
    """Under the same path, of the same size, with an index that is the same, or not: a run does not
    go on with them. A checkpoint from before they were compared says nothing."""
    paths = [corpus(tmp_path / name, number) for number, name in enumerate(["kept", "anew"])]
    line = words(
        tmp_path / "run", "data.mock_data=false", "data.sample_order=megatron",
        f"data.data_path=[[1,{paths[0]}],[1,{paths[1]}]]", "data.split=80,20,0",
        "training.train_iters=20",
    )  # fmt: skip
    config, tokenizer = load_config(line), NullTokenizer(64)
    (tmp_path / "run_config.yaml").write_text(config.to_yaml())
    tokenizer.save_copy(tmp_path)

    def resumed() -> None:
        start._resumed_plan(config, tokenizer, tmp_path, upcycle=False)

    resumed()
    digests = plan_data(config, tokenizer, None).files
    (tmp_path / DATA_FILES_FILE).write_text(files_json(digests))
    resumed()
    content = Path(f"{paths[1]}.bin").read_bytes()
    Path(f"{paths[1]}.bin").write_bytes(content[::-1])
    with pytest.raises(
        UserError, match=r"has counted other samples .*\n  - data\.data_path: "
    ) as e:
        resumed()
    assert str(e.value).endswith(f"\n  - data.data_path: {paths[1]} holds other tokens than before")
    (tmp_path / DATA_FILES_FILE).write_text('{"files": [1]}')
    with pytest.raises(DataError, match=f"{DATA_FILES_FILE} is damaged"):
        resumed()


def test_other_settings_of_a_run_that_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Typed for the first start and forgotten for the second: every field that weights come of is
    compared, but for how a run begins, and what is held or said elsewhere."""
    line = words(tmp_path / "run", "optimizer.weight_decay=0.2", "data.packed_documents=true")
    (tmp_path / "run_config.yaml").write_text(load_config(line).to_yaml())
    for config in (load_config(line), load_config([*line, "training.train_iters=40"])):
        start._note_other_training(config, tmp_path)
    assert not caplog.messages
    start._note_other_training(
        load_config(words(tmp_path / "run", "precision.recipe=bf16")), tmp_path
    )
    assert caplog.messages == [
        f"note: {tmp_path} was trained with other settings: optimizer.weight_decay=0.1 (there "
        "0.2), data.packed_documents=false (there true), precision.recipe='bf16' (there 'fp32')"
    ]
    caplog.clear()
    decays = ["optimizer.lr_decay_style=cosine", "training.train_iters=8"]
    (tmp_path / "run_config.yaml").write_text(load_config([*line, *decays]).to_yaml())
    for more, said in {
        (): "",
        ("training.train_iters=9",): "a schedule of the learning rate to the run's end at 1152 "
        "tokens (there 1024)",
        ("training.train_iters=9", "optimizer.restart_schedule=true"): "",
        ("training.global_batch_size=8", "training.train_iters=4"):
        "training.global_batch_size=8 (there 4)",
        ("optimizer.weight_decay=0.3", "model.hybrid_layer_pattern=M*E",
         "model.num_moe_experts=4", "model.moe_aux_loss_coeff=0.01"):
        "optimizer.weight_decay=0.3 (there 0.2)",
        ("training.train_iters=9", "optimizer.lr_decay_samples=32"):
        "optimizer.lr_decay_samples=32 (there null)",
    }.items():  # fmt: skip
        start._note_other_training(load_config([*line, *decays, *more], which=()), tmp_path)
        assert "".join(caplog.messages).partition("settings: ")[2] == said
        caplog.clear()
    begins = ("checkpoint.", "upcycling.")
    effects = {"weights", "training", "differs"}
    left_out = {name for name, effect in EFFECTS.items() if effect in effects} - {*TRAINING_FIELDS}
    assert {name for name in left_out if not name.startswith(begins)} == {
        "optimizer.restart_schedule", "training.objective", "training.objective_options",
        "training.seed",
    }  # fmt: skip


def test_a_run_that_goes_on_as_it_began_or_otherwise(
    sources: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Evaluations of other samples are told, with both; so is what each start leaves out of the
    run's own checkpoint. The same words again say nothing."""
    saves = tmp_path / "run" / "checkpoints"
    folder = saves / "iter_0000002"
    evaluated = ["training.eval_interval=4", "training.eval_iters=3"]
    line = phased_words(tmp_path / "run", sources, *evaluated)
    config, _, begun = start.open_run(load_config(line), 1)
    assert begun.data.plan is not None
    folder.mkdir(parents=True)
    (saves / TRACKER_FILE).write_text("2")
    (folder / "run_config.yaml").write_text(config.to_yaml())
    (folder / DATA_PLAN_FILE).write_text(SavedPlan(begun.data.plan, 8).to_json())
    NullTokenizer(64).save_copy(folder)
    held_out = "samples of 32 tokens from tokens 4816 to "
    blend = "data.phases[3].weights={math: 1, web: 3}"
    for more, said in {
        (): [],
        ("training.eval_interval=8", "optimizer.restart_schedule=false"): [],
        ("training.eval_iters=2",): [f"evaluations are of 2 {held_out}6020 of web, "],
        (blend,): [f" {held_out}6020 of web, "],
        ("data.split=80,10,10",): [f"evaluations are of 4 {held_out}5418 of web, "],
        ("checkpoint.load_optim=false",): ["checkpoint.load_optim=false is of every start of "],
    }.items():  # fmt: skip
        caplog.clear()
        with caplog.at_level("WARNING", "megatron_hybrid"):
            start.open_run(load_config([*line, *more]), 1)
        notes = [each for each in caplog.messages if each.startswith("note: ")]
        assert len(notes) == len(said)
        assert all(
            text in note and str(folder) in note for text, note in zip(said, notes, strict=True)
        )


def test_weights_alone_are_looked_at_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Before any rank starts: those of another model are refused, of another tokenizer told."""
    saves = tmp_path / "base" / "checkpoints"
    folder = saves / "iter_0000002"
    folder.mkdir(parents=True)
    (saves / "latest_checkpointed_iteration.txt").write_text("2")
    saved = load_config(words(tmp_path / "base"))
    (folder / "run_config.yaml").write_text(saved.to_yaml())
    NullTokenizer(64).save_copy(folder)
    line = words(tmp_path / "run", f"checkpoint.load={saves}", "checkpoint.finetune=true")
    with caplog.at_level("WARNING", "megatron_hybrid"):
        start.open_run(load_config(line), 1)
        assert not caplog.messages
        start.open_run(load_config([*line, "model.vocab_size=60"]), 1)
    assert caplog.messages == [
        f"note: data.tokenizer_model=None is not the tokenizer of {folder}, with whose ids its "
        "weights were trained"
    ]
    with pytest.raises(UserError, match=r"model\.mamba_state_dim=16, in the checkpoint 8"):
        start.open_run(load_config([*line, "model.mamba_state_dim=16"]), 1)


def test_made_up_tokens_of_another_seed(tmp_path: Path) -> None:
    """They are other samples, as those of files are."""
    (tmp_path / "run_config.yaml").write_text(load_config(words(tmp_path / "run")).to_yaml())
    NullTokenizer(64).save_copy(tmp_path)
    config = load_config(words(tmp_path / "run", "training.seed=7"))
    with pytest.raises(UserError, match=r"training\.seed=7, in the checkpoint 1234"):
        start._resumed_plan(config, NullTokenizer(64), tmp_path, upcycle=False)


def test_a_field_that_nothing_reads_is_no_other_function(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """RoPE's base without RoPE; experts' fields of a dense model that is upcycled."""
    (tmp_path / "run_config.yaml").write_text(load_config(words(tmp_path / "run")).to_yaml())
    experts = ["model.hybrid_layer_pattern=M*E", "model.num_moe_experts=4"]
    more = ["model.rotary_base=20000"], [*experts, "model.moe_router_topk=1"]
    with caplog.at_level("WARNING", "megatron_hybrid"):
        for changes in more:
            config = load_config(words(tmp_path / "run", *changes), which=())
            start._note_other_functions(config, tmp_path)
    assert not caplog.messages
