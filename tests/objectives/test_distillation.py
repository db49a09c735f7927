"""A student learns from a teacher in a whole run: evaluated, resumed to the bit, from half its
width; and what cannot teach it is refused before anything is done."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_hybrid.cli import app
from megatron_hybrid.config import load_config
from megatron_hybrid.data.tokenizer import NullTokenizer
from megatron_hybrid.model.counts import count_parameters
from megatron_hybrid.objectives.registry import objective_problems, step_flops_per_token
from megatron_hybrid.planner.hardware import GPUS
from megatron_hybrid.planner.memory import rank_memory
from megatron_hybrid.planner.step_time import step_time
from megatron_hybrid.testing import run_distributed
from megatron_hybrid.training.plot_distillation import draw_distillation
from tests.objectives.test_sft import corpus as conversations
from tests.training.phased import corpora, phased_words
from tests.training.runs import SEQ_LENGTH, VOCAB_SIZE, losses, outcomes, records, words

MICRO = "training.micro_batch_size=1"
STUDENT = ["model.hidden_size=16", "model.mamba_head_dim=8", "training.objective=distillation"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model of twice the width and another pattern."""
    folder = tmp_path_factory.mktemp("teacher")
    line = words(folder, "model.hybrid_layer_pattern=M*M-", "training.seed=7")
    assert run_distributed(outcomes, 1, [line])[0] == ["finished"]
    return folder


def student(run_dir: Path, teacher: Path, *more: str) -> list[str]:
    return words(run_dir, *STUDENT, f"training.objective_options.teacher={teacher}", *more)


def test_a_run(teacher: Path, tmp_path: Path) -> None:
    """It comes nearer to its teacher; a resumed run and one in other micro batches do the same, and
    evaluations tell of the held-out samples what steps tell of theirs. Its first weights are those
    of a run without a teacher: with the labels alone in both, so are its losses."""
    names = ("whole", "resumed", "micro", "plain", "labels")
    whole, resumed, micro, plain, labels = (tmp_path / name for name in names)
    longer = ["training.train_iters=12", "optimizer.lr=1e-2"]
    evaluated = ["training.eval_interval=12", "training.eval_iters=1"]
    lines = [
        student(whole, teacher, *longer, *evaluated),
        student(resumed, teacher, *longer, "training.exit_interval=5"),
        student(resumed, teacher, *longer),
        student(micro, teacher, *longer, "training.micro_batch_size=1"),
        words(plain, *STUDENT[:2]),
        student(labels, teacher, "training.objective_options.kl_weight=1e-30",
                "training.objective_options.lm_loss_weight=1.0"),
    ]  # fmt: skip
    found = run_distributed(outcomes, 1, lines)[0]
    assert found == ["finished", "exit_interval", *["finished"] * 4]
    steps = records(whole)
    assert losses(whole)[-1] < 0.8 * losses(whole)[0]
    assert losses(whole) == pytest.approx([step["extra"]["kl"] for step in steps], rel=1e-6)
    assert losses(resumed) == losses(whole)
    assert losses(micro) == pytest.approx(losses(whole), rel=1e-5)
    assert losses(labels) == pytest.approx(losses(plain), rel=1e-6)
    [evaluation] = records(whole, "validation")
    assert evaluation["loss"] == pytest.approx(evaluation["extra"]["kl"], rel=1e-6)
    assert evaluation["extra"].keys() == {"kl", "agreement", "lm_loss", "teacher_lm_loss"}
    # The teacher is the same all the time; the samples are not.
    assert steps[0]["extra"]["teacher_lm_loss"] == pytest.approx(
        steps[-1]["extra"]["teacher_lm_loss"], rel=0.1
    )


def test_by_source(teacher: Path, tmp_path: Path) -> None:
    """Of three sources, packed and in phases: each token's figures are its own source's, in steps
    and on held-out samples, and the picture has both models' lines. Once the run has begun, the
    teacher's files may go."""
    run_dir, sources = tmp_path / "run", corpora(tmp_path, "math", "code", "web")
    its = shutil.copytree(teacher, tmp_path / "teacher")
    line = [
        *phased_words(run_dir, sources, *STUDENT, "data.packed_documents=true"),
        f"training.objective_options.teacher={its}", "training.eval_interval=2",
        "training.eval_iters=2", "data.split=80,20,0",
        "training.callbacks=[tests.objectives.own:WithoutTeacher]",
    ]  # fmt: skip
    assert run_distributed(outcomes, 1, [line])[0] == ["finished"]
    assert not its.exists()
    tokens: dict[str, int] = {}
    for record in records(run_dir):
        extra = record["extra"]
        read = {n: total - tokens.get(n, 0) for n, total in record["source_tokens"].items()}
        tokens = record["source_tokens"]
        assert {name for name in read if f"kl/{name}" in extra} == {n for n in read if read[n]}
        for figure in ("kl", "agreement", "lm_loss", "teacher_lm_loss"):
            # A few tokens less, at the ends of documents.
            mean = sum(extra.get(f"{figure}/{n}", 0.0) * read[n] for n in read) / sum(read.values())
            assert extra[figure] == pytest.approx(mean, rel=0.05)
    evaluation = records(run_dir, "validation")[-1]["extra"]
    assert any(name.startswith("kl/") for name in evaluation)
    draw_distillation(run_dir, tmp_path / "it.png")
    assert (tmp_path / "it.png").stat().st_size > 10_000


def test_several_teachers(teacher: Path, tmp_path: Path) -> None:
    """Two that are one, with shares of the weight, are that one; by source, each source's figures
    are those of a run with its own teacher alone, and a source without one learns nothing. By
    phase, each phase has its own teacher; held-out samples have both."""
    other = tmp_path / "other"
    shutil.copytree(teacher, other)  # another one to the run
    sources = corpora(tmp_path, "math", "code", "web")
    data = phased_words(tmp_path, sources, *STUDENT, "training.exit_interval=2")

    def line(run_dir: str, **teachers: str) -> list[str]:
        text = ", ".join(f"{name}: {value}" for name, value in teachers.items())
        option = f"training.objective_options.teachers={{{text}}}"
        return [*data, f"run_dir={tmp_path / run_dir}", option]

    def made(folder: Path, more: str) -> str:
        return f"{{checkpoint: {folder}, {more}}}"

    alone = f"training.objective_options.teacher={teacher}"
    # The second phase begins with step 9.
    longer = ["training.exit_interval=9", "training.eval_interval=2", "training.eval_iters=1"]
    lines = [
        [*data, f"run_dir={tmp_path / 'one'}", alone, *longer],
        [
            *line(
                "phases", a=made(teacher, "phases: {broad: 1}"), b=made(other, "phases: {code: 3}")
            ),
            *longer,
        ],
        line("two", a=made(teacher, "weight: 0.25"), b=made(other, "weight: 0.75")),
        line("own", a=made(teacher, "sources: {web: 1}"), b=made(other, "sources: {code: 2}")),
    ]
    assert run_distributed(outcomes, 1, lines)[0] == ["exit_interval"] * 4
    one, phased, two, own = (records(tmp_path / name) for name in ("one", "phases", "two", "own"))
    for a, b in zip(one[:8], phased[:8], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
    assert phased[8]["loss"] == pytest.approx(3 * one[8]["loss"], rel=1e-6)
    assert len(one) == len(phased) == 9
    held, both = (records(tmp_path / name, "validation")[0] for name in ("one", "phases"))
    assert both["loss"] == pytest.approx(2 * held["loss"], rel=1e-6)
    for a, b in zip(one[:2], two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["extra"] == pytest.approx(a["extra"], rel=1e-6)
    first, its = one[0]["extra"], own[0]["extra"]
    assert its["kl/web"] == pytest.approx(first["kl/web"], rel=1e-6)
    assert its["kl/code"] == pytest.approx(2 * first["kl/code"], rel=1e-6)
    assert its["agreement/code"] == pytest.approx(first["agreement/code"], rel=1e-6)
    assert its.get("kl/math", 0.0) == 0.0 < first.get("kl/math", 1.0)


def test_conversations(teacher: Path, tmp_path: Path) -> None:
    """Rows of whole conversations, of which the assistant's tokens are learnt: as many in any micro
    batches, and the run's own held-out ones evaluate to what it found, without its teacher."""
    moved = tmp_path / "teacher"
    shutil.copytree(teacher, moved)
    both = [tmp_path / "whole", tmp_path / "micro"]
    chats = conversations(tmp_path / "chats", 1)
    line = [
        "training.objective=sft_distillation", "data.packed_documents=true", "data.split=80,20,0",
        "data.mock_data=false", f"data.data_path={chats}", "training.eval_interval=4",
        "training.eval_iters=1",
    ]  # fmt: skip
    lines = [student(both[0], moved, *line), student(both[1], moved, *line, MICRO)]
    assert run_distributed(outcomes, 1, lines)[0] == ["finished"] * 2
    assert losses(both[1]) == pytest.approx(losses(both[0]), rel=1e-5)
    shutil.rmtree(moved)
    done = CliRunner().invoke(app, ["evaluate", str(both[0])])
    assert done.exit_code == 0, done.output
    [evaluation] = records(both[0], "evaluation")
    [validation] = records(both[0], "validation")
    assert evaluation["total"]["loss"] == pytest.approx(validation["extra"]["lm_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["model.vocab_size=65"], "has model.vocab_size=64; it must be the student's, 65"),
        (["model.attn_mask_type=no_mask"], "needs model.attn_mask_type=causal; it is no_mask"),
        (["training.objective_options.teacher=/nowhere"], "teacher=/nowhere: /nowhere does not"),
        (["parallel.pipeline_model_parallel_size=5"], "parallel.pipeline_model_parallel_size=5"),
        (["training.objective_options.teacher_parallel.tensor_model_parallel_size=4"],
         "parallel.tensor_model_parallel_size=4 must divide model.num_attention_heads=2"),
        (["training.objective_options.teacher_parallel.tensor=2"], "teacher_parallel"),
        (["training.objective_options.teachers={a: {checkpoint: /nowhere, sources: {x: 1}}}"],
         ", with teachers; allowed: one teacher, or its answers"),
        (["training.objective_options.teacher=null"],
         "training.objective_options.teacher is not set; allowed: one teacher, or its answers"),
        (["training.objective_options.teacher=null",
          "training.objective_options.teachers={a: {checkpoint: /nowhere, sources: {x: 1}}}"],
         "teachers.a.sources: x is not a source of the data; allowed: none"),
        (["training.objective_options.teacher=null",
          "training.objective_options.teachers={a: {checkpoint: /nowhere}}"],
         "teachers.a=/nowhere: /nowhere does not exist"),
        (["training.objective_options.teacher=null",
          "training.objective_options.teachers={a: {checkpoint: /nowhere, phases: {x: 1}}}"],
         "teachers.a.phases: x is not a phase of the data; allowed: none"),
        (["training.objective_options.teachers={a: 3}"], "teachers={'a': 3} must be teachers by"),
        (["training.objective_options.temperature=0"], "temperature=0 must be"),
        (["training.objective_options.kl_type=both"], "kl_type='both' must be one of forward"),
    ],
)  # fmt: skip
def test_what_is_refused(more: list[str], problem: str, teacher: Path, tmp_path: Path) -> None:
    """A teacher of other words or another tokenizer, one that is not there or cannot be in the
    layout, and options that are none: each named."""
    line = student(tmp_path, teacher, *more)
    found = "\n".join(objective_problems(load_config(line, which=())))
    assert problem in found


def test_another_tokenizer(teacher: Path, tmp_path: Path) -> None:
    """One of as many words that is another one."""
    other = tmp_path / "other"
    shutil.copytree(teacher / "checkpoints", other)
    [file] = other.rglob(NullTokenizer.file_name)
    file.write_text('{"vocab_size": 63}')
    [problem] = objective_problems(load_config(student(tmp_path, other), which=()))
    assert "has another tokenizer than data.tokenizer_model=" in problem and str(other) in problem


def test_counted_and_planned(teacher: Path, tmp_path: Path) -> None:
    """FLOPs, memory and time of a step have the teacher's: of one like the student, a third of what
    training costs, and its weights; on the last stage its logits and, where a pipeline is waited
    for, hidden states of all micro batches."""
    like = ["model.hybrid_layer_pattern=M*M-", "data.packed_documents=false"]
    plain = load_config(words(tmp_path, *like))
    taught = load_config(
        [*words(tmp_path, *like), "training.objective=distillation",
         f"training.objective_options.teacher={teacher}"]
    )  # fmt: skip
    flops = [step_flops_per_token(each, SEQ_LENGTH) for each in (plain, taught)]
    assert flops[1] == pytest.approx(4 / 3 * flops[0])
    times = [step_time(each, 1, GPUS["h100"]) for each in (plain, taught)]
    extra = times[1].parts["frozen models"]
    assert times[1].seconds == pytest.approx(times[0].seconds + extra)
    assert 0.2 * times[0].seconds < extra < 0.55 * times[0].seconds
    [whole] = rank_memory(taught, 1, fused=False)
    assert rank_memory(plain, 1, fused=False)[0].frozen == 0
    tokens, weights = 2 * SEQ_LENGTH, 4 * count_parameters(taught.model).total
    logits = 4 * tokens * VOCAB_SIZE
    assert weights + logits < whole.frozen < weights + logits + 40 * 4 * tokens * 32
    cut = ["model.hybrid_layer_pattern=M*|M-", "parallel.pipeline_model_parallel_size=2"]
    stages = rank_memory(
        load_config([*student(tmp_path, teacher), *cut, "training.global_batch_size=8"]), 2,
        fused=False,
    )  # fmt: skip
    waiting = 4 * tokens * 4 * 32
    assert stages[1].frozen > waiting + logits
    assert sum(stage.frozen for stage in stages) > weights + waiting + logits
