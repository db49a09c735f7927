"""What `evaluate` reads, refuses and writes down."""

import json
import logging
import math
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_hybrid import cli
from megatron_hybrid.checkpoint.saved_here import remember, stamp
from megatron_hybrid.config import TRACKER_FILE, RunConfig, load_config, rules
from megatron_hybrid.data.datasets import plan_data
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.saved_files import DATA_FILES_FILE, files_json
from megatron_hybrid.data.saved_plan import DATA_PLAN_FILE, SavedPlan
from megatron_hybrid.data.tokenizer import NullTokenizer
from megatron_hybrid.errors import UserError
from megatron_hybrid.evaluation.own_data import OwnData
from megatron_hybrid.evaluation.run import Asked, _figures, keep, open_evaluation
from megatron_hybrid.evaluation.sources import find_texts, find_tokens
from megatron_hybrid.training.metrics import read_records
from tests.data.conftest import VOCAB_SIZE, write_conversations, write_corpus

TEXTS = ["3 1 4", "", "1 5 9 2 6", "7"]
DOCUMENTS = [[3, 1, 4, 74], [1, 5, 9, 2, 6, 74], [7, 74]]


def test_texts_are_the_tokens_that_data_tokenize_makes_of_them(tmp_path: Path) -> None:
    """A line a document; the whole of a .txt; with end tokens, or without."""
    lines, plain, tokenizer = tmp_path / "a.jsonl", tmp_path / "b.txt", NullTokenizer(75)
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    plain.write_text("3 1\n4")
    words = f"data tokenize --input {lines} --output {tmp_path}/a --tokenizer-type null"
    done = CliRunner().invoke(
        cli.app, [*words.split(), "--vocab-size", "75", "--no-shuffle", "--workers", "1"]
    )
    assert done.exit_code == 0, done.output
    made = [
        *find_texts([str(lines), str(plain)], "text", tokenizer, append_eod=True),
        *find_tokens([str(tmp_path / "a")], tokenizer),
    ]
    found = [[ids.tolist() for ids in each.documents()] for each in made]
    assert found == [DOCUMENTS, DOCUMENTS[:1], DOCUMENTS]
    [bare] = find_texts([str(plain)], "text", tokenizer, append_eod=False)
    assert [ids.tolist() for ids in bare.documents()] == [[3, 1, 4]]
    lines.write_text('{"text": "1"}\n{"txt": "1"}\n')
    [broken] = find_texts([str(lines)], "text", tokenizer, append_eod=True)
    with pytest.raises(DataError, match=r"a\.jsonl line 2: key 'text' is missing"):
        list(broken.documents())


def checkpoint(run: Path) -> Path:
    """A run's folder with a checkpoint that has all but weights."""
    words = "tiny --mock-data --tokenizer-type null model.vocab_size=256 training.train_iters=1"
    trained = load_config([*words.split(), "run_dir=x"], which=rules.NO_FILES)
    folder = run / "iter_0000001"
    folder.mkdir()
    (run / TRACKER_FILE).write_text("1")
    (folder / "run_config.yaml").write_text(trained.to_yaml())
    NullTokenizer(256).save_copy(folder)
    return run


def test_what_cannot_be_is_refused_before_any_model_is_loaded(tmp_path: Path) -> None:
    """Words, windows, layouts and files, each by its name."""
    checkpoint(tmp_path)
    text = tmp_path / "a.txt"
    text.write_text("1 2")
    files = Asked(inputs=[str(text)])
    for asked, said, ranks, problem in (
        (files, ["optimizer.lr=1"], 1, "optimizer.lr is not for evaluation of files to change"),
        (files, ["data.split=1,1,1"], 1, "data.split is not for evaluation of files"),
        (Asked(), ["data.packed_documents=x"], 1, "data.packed_documents='x' must be"),
        (files, ["parallel.context_parallel_size=2"], 3, "number of ranks, 3, must be a multiple"),
        (files, ["parallel.tensor_model_parallel_size=3"], 3, "must divide model"),
        (Asked([str(text)], overlap=8), ["data.seq_length=8"], 1, "--overlap 8 must be less"),
        (Asked(inputs=["nothing"]), [], 1, "nothing"),
        (Asked(prefixes=["none*"]), [], 1, "none* matches no token files"),
        (Asked(prefixes=["nothing"]), [], 1, "cannot read nothing.idx"),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            open_evaluation(tmp_path, asked, said, world_size=ranks)
        assert problem in str(error.value)
    opened = open_evaluation(
        tmp_path, files, ["parallel.tensor_model_parallel_size=2"], world_size=4
    )
    assert opened.config.parallel.sequence_parallel and len(opened.documents) == 1
    assert open_evaluation(tmp_path, Asked(), [], world_size=1).own is not None


def test_other_data_are_other_by_whatever_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flag of Megatron-LM's says so as a field does; the run's own plan has one length."""
    folder = checkpoint(tmp_path)
    changed: list[dict[str, object]] = []
    monkeypatch.setattr(OwnData, "find", lambda *_, **how: changed.append(how["said"]))
    for words in ([], ["data.seq_length=8"], ["data.split=1,1,1"], ["--split", "1,1,1"]):
        open_evaluation(folder, Asked(), words, world_size=1)
    assert changed == [{}, {"data.seq_length": 8}, *2 * [{"data.split": "1,1,1"}]]
    layout = ["parallel.tensor_model_parallel_size=2"]
    text = Asked(inputs=[str(folder / "a.txt")], append_eod=False)
    (folder / "a.txt").write_text("1")
    assert open_evaluation(folder, text, layout, world_size=2).changed == {}
    assert text.texts == {"append_eod": False} and Asked().texts == {}


def reading(*words: str) -> RunConfig:
    """A short run of samples of 32 tokens."""
    start = "tiny --tokenizer-type null --seq-length 32 --train-iters 5 --global-batch-size 8"
    return load_config([*start.split(), f"model.vocab_size={VOCAB_SIZE}", *words], which=())


@pytest.mark.parametrize("order", ["plan", "megatron"])
def test_files_that_were_made_anew_are_not_the_runs_own(order: str, tmp_path: Path) -> None:
    """Whatever else is said, but for files; and no cap of the training is in the way of others."""
    tokenizer = NullTokenizer(VOCAB_SIZE)
    texts = [[i % 7 for i in range(60)] for _ in range(40)]
    path = write_corpus(tmp_path / "a", texts)
    config = reading(f"data.data_path={path}", f"data.sample_order={order}", "data.split=1,1,0")
    data = plan_data(config, tokenizer, None)
    if data.plan is not None:
        (tmp_path / DATA_PLAN_FILE).write_text(SavedPlan(data.plan, 8).to_json())
    else:
        (tmp_path / DATA_FILES_FILE).write_text(files_json(data.files))
    for said in ((), ("training.eval_iters",)):
        assert OwnData.find(config, tmp_path, tokenizer, said=said).data.valid_steps
    write_corpus(tmp_path / "a", [texts[0][::-1], *texts[1:]])
    for said in ((), ("training.eval_iters",)):
        with pytest.raises(UserError, match="other tokens than"):
            OwnData.find(config, tmp_path, tokenizer, said=said)
    assert OwnData.find(config, tmp_path, tokenizer, said=["data.data_path"])
    if order == "plan":
        capped = config.data.model_copy(update={"max_epochs": 0.01})
        config = config.model_copy(update={"data": capped})
        assert OwnData.find(config, tmp_path, tokenizer, said=["data.data_path"])


def test_what_is_said_of_other_data_has_an_effect_or_none_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fields of no effect, masks that nobody reads, a key of files without any; and what
    `training.objective` refuses of a run is refused here."""
    tokenizer = NullTokenizer(VOCAB_SIZE)
    paths = [write_corpus(tmp_path / name, [[1, 2, 3] * 900]) for name in "ab"]
    sources = {n: {"path": p, "split": "1,1,0"} for n, p in zip("ab", paths, strict=True)}
    config = reading(
        f"data.sources={json.dumps(sources)}", "data.phases=[{name: all, weights: {a: 1}}]",
        "data.split=5,3,2",
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        OwnData.find(config, tmp_path, tokenizer, said=["training.eval_iters"])
        assert not caplog.messages
        OwnData.find(config, tmp_path, tokenizer, said=["data.split", "data.sources"])
    assert [each.partition(":")[2].partition(":")[0] for each in caplog.messages] == [
        " data.split=5,3,2 has no effect", " data.sources.b has no effect",
    ]  # fmt: skip
    training = config.training.model_copy(update={"objective": "sft"})
    with pytest.raises(UserError, match="packed_documents must be true"):
        OwnData.find(config.model_copy(update={"training": training}), tmp_path, tokenizer, said=())
    talks = write_conversations(tmp_path / "talks", [([1, 2, 3], [False, False, True])], VOCAB_SIZE)
    caplog.clear()
    find_tokens([paths[0], talks], tokenizer)
    assert [each for each in caplog.messages if "every token is counted" in each] == [
        each for each in caplog.messages if each.startswith(f"note: {talks}: conversations")
    ] != []  # fmt: skip
    plain, lines = tmp_path / "b.txt", tmp_path / "c.jsonl"
    plain.write_text("3 1")
    lines.write_text("{}")
    with pytest.raises(UserError, match=r"--json-key body: every --input is a \.txt"):
        find_texts([str(plain)], "body", tokenizer, append_eod=True)
    assert find_texts([str(plain), str(lines)], "body", tokenizer, append_eod=True)


def test_a_record_is_kept_with_the_run(tmp_path: Path) -> None:
    """After what is there, and no sign that it lives; nowhere, where no run saved the model."""
    folder = tmp_path / "checkpoints" / "iter_0000003"
    folder.mkdir(parents=True)
    mark = stamp(folder)
    record = {"kind": "evaluation", "iteration": 3}
    assert keep(record, folder) is None
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind":"event","iteration":1}\n')
    os.utime(path, (5, 5))
    assert keep(record, folder) is None  # an import, or a copy of another run's
    remember(folder.parent, folder.name, mark)
    assert keep(record, folder) == path
    assert read_records(path)[1:] == [record]
    assert path.stat().st_mtime == 5
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind":"train","iter')  # of a run that was killed
    assert keep(record, folder) is None
    assert path.read_bytes() == whole + b'{"kind":"train","iter'


def test_a_loss_beyond_what_json_has() -> None:
    """No figure is made up: what overflows, or was never counted, is null."""
    assert _figures(3.0, 2.0) == {"loss": 1.5, "perplexity": math.exp(1.5), "tokens": 2}
    assert _figures(0.0, 0.0) == {"loss": None, "perplexity": None, "tokens": 0}
    for loss in (800.0, math.inf, math.nan):
        assert _figures(loss, 1.0)["perplexity"] is None
