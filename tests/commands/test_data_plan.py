"""`megatron-hybrid data plan`, as it is typed: figures, caps, scale, and going on in mid-run."""

import json
import logging
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_hybrid import cli
from megatron_hybrid.config import TRACKER_FILE, load_config, phases, rules
from megatron_hybrid.data.facts import Facts, InputFacts, TokenizerFacts
from megatron_hybrid.data.indexed import IndexedFileWriter, token_dtype
from megatron_hybrid.data.run_plan import open_run_sources, training_plan
from megatron_hybrid.data.saved_plan import DATA_PLAN_FILE, SavedPlan
from megatron_hybrid.data.tokenizer import NullTokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "03_phases"
FOUR_PHASES = str(EXAMPLE / "nemotron_h_8b_four_phases.yaml")
STAND_INS = runpy.run_path(str(EXAMPLE / "make_stand_ins.py"))
HELD_OUT = 0.031  # by data.split

Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Plan:
    """Runs the command in a folder of its own; its exit code, what it printed, and its errors."""
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("megatron_hybrid")
    monkeypatch.setattr(logger, "handlers", [])

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["megatron-hybrid", "data", "plan", *words])
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        else:
            code = 0
        logger.handlers.clear()
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def stand_ins(folder: Path, tokens: dict[str, int]) -> Path:
    """Sources of these sizes that take no room."""
    for name, size in tokens.items():
        STAND_INS["make_source"](folder, name, size)
    return folder


@pytest.fixture
def three(tmp_path: Path) -> str:
    """A run of 1.5M tokens: two sequence lengths, three phases, three sources."""
    stand_ins(tmp_path / "d", {"web": 3_000_000, "code": 400_000, "math": 250_000})
    file = tmp_path / "three.yaml"
    file.write_text(
        """preset: tiny
run_dir: runs/three
data:
  tokenizer_type: null
  split: "90,10,0"
  sources: {web: {path: "d/web_*"}, code: {path: "d/code_*"}, math: {path: "d/math_*"}}
  phases:
    - {name: one, weights: {web: 3, code: 1}}
    - {name: two, start_tokens: 600e3, seq_length: 512, weights: {web: 2, code: 1, math: 1}}
    - {name: three, last_tokens: 300e3, weights: {math: 1}}
model: {vocab_size: 256}
training: {train_tokens: 1.5e6, global_batch_size: 8, batch_size_schedule: [[400e3, 16]]}
""",
        encoding="utf-8",
    )
    return str(file)


def report(plan: Plan, *words: str) -> dict[str, Any]:
    code, out, err = plan(*words, "--json")
    assert code == 0, err
    return json.loads(out)  # type: ignore[no-any-return]


def test_the_papers_four_phases(plan: Plan, tmp_path: Path) -> None:
    """The example, over files of terabytes that hold nothing: boundaries, weights and epochs are
    those that the paper's table gives by hand."""
    stand_ins(tmp_path / "data" / "nemotron_h", STAND_INS["SOURCES"])
    found = report(plan, FOUR_PHASES)
    batch = 768 * 8192
    assert found["steps"] == 2_384_186
    ends = [phase["end_tokens"] for phase in found["phases"]]
    nominal = [9_000 * 10**9, 12_000 * 10**9, 14_620 * 10**9, 15_000 * 10**9]
    assert all(0 <= want - end < batch for want, end in zip(nominal[:3], ends, strict=False))
    assert 0 <= ends[3] - nominal[3] < batch
    for phase, declared in zip(
        found["phases"], phases(load_config([FOUR_PHASES], which=rules.NO_FILES)), strict=True
    ):
        samples = phase["end_sample"] - phase["first_sample"]
        assert sum(use["samples"] for use in phase["sources"]) == samples
        for use in phase["sources"]:
            assert abs(use["samples"] - declared.weights[use["name"]] * samples) <= 1
    shares = {
        "web": (59, 40.7, 32.7 / 0.999, 13.5 / 0.999),
        "sft": (0, 0.9, 12.6 / 0.999, 31.8 / 0.999),
    }
    lengths = (9e12, 3e12, 2.62e12, 0.38e12)
    epochs = {source["name"]: source["epochs"] for source in found["sources"]}
    for name, parts in shares.items():
        read = sum(part / 100 * tokens for part, tokens in zip(parts, lengths, strict=True))
        held = 1 - HELD_OUT
        assert epochs[name] == pytest.approx(read / (STAND_INS["SOURCES"][name] * held), rel=1e-4)


def test_tables(plan: Plan, three: str) -> None:
    """Every phase and source with its figures; what the change of sequence length skips is said."""
    code, out, err = plan(three)
    assert code == 0
    assert [line.split(" (.meta")[0] for line in err.splitlines()] == [
        f"source {name}: 1 of 1 shards have no facts" for name in ("web", "code", "math")
    ]
    lines = [line.split() for line in out.splitlines()]
    assert ["one", "0", "598.02K", "39.78%", "256", "8", "→", "16", "2,336", "244"] in lines
    assert ["one", "web", "75.00%", "1,752", "448.51K", "0.17"] in lines
    assert "tokens passed over where the sequence length changes" in out
    found = report(plan, three)
    assert [phase["seq_length"] for phase in found["phases"]] == [256, 512, 256]
    assert [phase["batch_sizes"] for phase in found["phases"]] == [[8, 16], [16], [16]]
    assert found["steps"] == sum(phase["steps"] for phase in found["phases"])
    for source in found["sources"]:
        assert source["tokens"] == source["held_out"] + source["left_out"] + source["epoch_tokens"]
        passed = source["read_tokens"] + source["skipped_tokens"]
        assert passed == pytest.approx(source["epochs"] * source["epoch_tokens"], abs=1)
    assert sum(source["read_tokens"] for source in found["sources"]) == found["tokens"]


def test_caps_refuse_after_the_tables(plan: Plan, three: str, tmp_path: Path) -> None:
    """Above a cap: the tables mark it, the error names the field and the phase, and
    no config is written; the picture is, to see it on."""
    typed = ["data.sources.math.max_epochs=1.5", "--scale", "1", "--write", "x.yaml", "-o", "x.png"]
    code, out, err = plan(three, *typed)
    assert code == 1
    assert "> 1.5" in out
    assert "data.sources.math.max_epochs=1.5" in err
    assert "in phase three" in err
    assert not (tmp_path / "x.yaml").exists()
    assert (tmp_path / "x.png").exists()
    code, _, err = plan(three, "data.max_epochs=1.5")
    assert code == 1 and "data.max_epochs=1.5" in err


def test_many_epochs_without_a_cap_are_warned_of(plan: Plan, three: str) -> None:
    """More than four passes are a warning, not an error."""
    code, _, err = plan(three, "data.sources.math.fraction=0.25")
    assert code == 0
    assert err.splitlines()[-1].startswith("the run reads source math 8.")


@pytest.mark.parametrize("scale", ["1/3", "0.1"])
def test_scale_keeps_the_epochs(plan: Plan, tmp_path: Path, scale: str) -> None:
    """Sources, phases and lengths shrink together: epochs stay, up to a block of each source, and
    the config that is written plans the same."""
    sizes = {"web": 60_000_000, "code": 10_000_000, "math": 4_000_000}
    stand_ins(tmp_path / "d", sizes)
    words = ["tiny", "--tokenizer-type", "null", "--vocab-size", "256", "--train-tokens", "5e7"]
    words += [f"data.sources.{name}.path=d/{name}_*" for name in sizes]
    words += ["data.sources.web.fraction=0.5", "training.batch_size_schedule=[[1e7, 32]]"]
    words.append(
        "data.phases=[{name: a, weights: {web: 2, code: 1}}, {name: b, start_fraction: 0.6,"
        " seq_length: 512, weights: {web: 1, code: 1, math: 1}}]"
    )
    whole = report(plan, *words)
    Path("small.yaml").write_text("seed: 1")
    code, _, err = plan(*words, "--scale", scale, "--write", "small.yaml", "--json")
    assert code == 1 and "--write small.yaml: a file is there, and not the config of runs/" in err
    assert Path("small.yaml").read_text() == "seed: 1"
    Path("small.yaml").unlink()
    for _ in range(2):  # over its own again
        code, out, err = plan(*words, "--scale", scale, "--write", "small.yaml", "--json")
        assert code == 0, err
    small = json.loads(out)
    factor = 1 / 3 if scale == "1/3" else 0.1
    assert small["tokens"] == pytest.approx(factor * whole["tokens"], rel=2e-3)
    for big_phase, phase in zip(whole["phases"], small["phases"], strict=True):
        for big, use in zip(big_phase["sources"], phase["sources"], strict=True):
            assert use["epochs"] == pytest.approx(big["epochs"], rel=0.01), use["name"]
    assert report(plan, "small.yaml") == small
    assert load_config(["small.yaml"], which=rules.NO_FILES).run_dir == Path(
        f"runs/default-{'1_3' if scale == '1/3' else '1_10'}"
    )


def save_checkpoint(file: str, consumed_samples: int) -> None:
    """What a run leaves of its plan, after so many samples."""
    config = load_config([file], which=rules.PLAN)
    made = training_plan(config, open_run_sources(config, None))
    assert config.checkpoint.save is not None
    folder = config.checkpoint.save / "iter_0000010"
    folder.mkdir(parents=True)
    (folder / DATA_PLAN_FILE).write_text(SavedPlan(made, consumed_samples).to_json())
    (config.checkpoint.save / TRACKER_FILE).write_text("10")


def test_a_run_with_checkpoints_is_planned_on(plan: Plan, three: str, tmp_path: Path) -> None:
    """What was read stays; edits of what comes are planned, edits of the past refused."""
    before = report(plan, three)
    save_checkpoint(three, 800)
    code, out, err = plan(three, "-o", "on.png")
    assert code == 0
    assert "planned on from runs/three/checkpoints/iter_0000010" in err
    assert "goes on after 204.80K tokens in 800 samples" in out
    after = report(plan, three)
    assert after["consumed_tokens"] == 800 * 256
    assert after["steps"] == before["steps"] - 100
    assert sum(source["consumed_tokens"] for source in after["sources"]) == 800 * 256
    edited = report(plan, three, "data.phases[2].weights.code=1")
    assert edited["phases"][:2] == after["phases"][:2]
    assert {use["name"] for use in edited["phases"][2]["sources"]} == {"math", "code"}
    code, _, err = plan(three, "data.phases[0].weights.code=2")
    assert code == 1
    assert "data.phases[0].weights.code" in err
    small = report(plan, three, "--scale", "1/2")  # another run, in another folder
    assert small["consumed_samples"] == 0
    _, _, err = plan(three, "--scale", "1/2", "checkpoint.load=runs/three/checkpoints")
    assert "note: checkpoint.load=runs/three/checkpoints has no effect on the smaller" in err


def test_a_checkpoint_of_other_samples(plan: Plan, three: str) -> None:
    """As the run would: it is refused where its counts are of others, and said where it has no
    plan, so that the run goes on in this one."""
    save_checkpoint(three, 800)
    folder = Path("runs/three/checkpoints/iter_0000010")
    (folder / DATA_PLAN_FILE).unlink()
    code, _, err = plan(three)
    assert code == 0
    assert "iter_0000010 holds no plan of its data" in err
    saved = load_config([three, "training.seed=7"], which=rules.PLAN)
    (folder / "run_config.yaml").write_text(saved.to_yaml())
    code, _, err = plan(three)
    assert code == 1
    assert "training.seed=1234, in the checkpoint 7" in err


def test_files_are_held_against_the_tokenizer(plan: Plan, tmp_path: Path) -> None:
    """As the run would; where the tokenizer is not here, it is said that they were not."""
    prefix = tmp_path / "web"
    writer, tokenizer = IndexedFileWriter(prefix, 300), NullTokenizer(300)
    for _ in range(40):
        ids = np.array([*range(200), tokenizer.eod], dtype=token_dtype(300))
        writer.add_documents(ids.tobytes(), np.array([len(ids)], dtype=np.int32))
    named = TokenizerFacts("null", tokenizer.fingerprint, 300, tokenizer.eod)
    read = InputFacts((), 40, 0, 0)
    facts = Facts(**vars(writer.finish()), tokenizer=named, append_eod=True, shuffle_seed=None,
                  input=read)  # fmt: skip
    writer.attach(facts)
    writer.publish()
    words = ["tiny", "--data-path", str(prefix), "training.train_tokens=4096",
             "data.seq_length=128",
             "training.global_batch_size=4", "--tokenizer-type"]  # fmt: skip
    code, _, err = plan(*words, "null", "--vocab-size", "300")
    assert (code, err) == (0, "")
    code, out, err = plan(*words, "null", "--vocab-size", "400")
    assert (code, out) == (1, "")
    assert f"{prefix} was made with another tokenizer" in err
    for given, lacking in (
        ("null", "model.vocab_size is not set"),
        ("huggingface --tokenizer-model none", "data.tokenizer_model=none: no such file"),
        ("sentencepiece", "data.tokenizer_model is not set"),
    ):
        code, _, err = plan(*words, *given.split())
        assert code == 0
        assert f"note: {lacking}: the files are not held against the run's tokenizer" in err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["tiny"], "data.data_path is not set; it must be"),
        (["tiny", "--mock-data"], "data.mock_data=true has no plan"),
        (["tiny", "--data-path", "x", "data.sample_order=megatron"], "has no plan: megatron-core"),
        (
            ["tiny", "--data-path", "x"],
            "data.data_path: 'x' is incomplete; no file x.bin and x.idx",
        ),
        (["tiny", "--scale", "2"], "--scale=2 must be a number above 0 and of at most 1"),
    ],
)
def test_errors(plan: Plan, tmp_path: Path, words: list[str], problem: str) -> None:
    """What cannot be planned is said in words."""
    if problem.startswith("--scale"):
        stand_ins(tmp_path, {"web": 10**6})
        words = [*words, "--data-path", str(tmp_path / "web_0")]
    code, out, err = plan(*words)
    assert (code, out) == (1, "")
    assert problem in err


def test_what_cannot_be_written_is_said(plan: Plan, three: str) -> None:
    """A picture into a file's folder, a config without --scale."""
    code, _, err = plan(three, "-o", f"{three}/x.png")
    assert code == 1
    assert f"{three}/x.png cannot be written: " in err
    code, _, err = plan(three, "--write", "x.yaml")
    assert code == 2 and "only with --scale" in err


def test_a_plan_of_200_sources_needs_little(tmp_path: Path) -> None:
    """The real command, without torch, the engine or matplotlib, for 15T tokens of 200 sources."""
    names = [f"s{number}" for number in range(200)]
    stand_ins(tmp_path, dict.fromkeys(names, 10**11))
    blend = [word for name in names for word in ("1", str(tmp_path / f"{name}_0"))]
    words = ["nemotron_h_8b", "--data-path", *blend, "--json"]
    command = [sys.executable, "-X", "importtime", "-m", "megatron_hybrid.cli", "data", "plan"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "numpy" in loaded
    assert loaded.isdisjoint({"torch", "megatron", "matplotlib", "transformers", "tokenizers"})
    assert len(json.loads(done.stdout)["sources"]) == 200


def test_picture(plan: Plan, three: str, tmp_path: Path) -> None:
    """-o draws the plan, as wide as the other pictures of a run."""
    code, _, _ = plan(three, "-o", "new/blend.png")
    assert code == 0
    assert imread(tmp_path / "new" / "blend.png").shape[1] == 1760
