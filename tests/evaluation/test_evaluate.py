"""What `evaluate` reads, refuses and writes down."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_hybrid import cli
from megatron_hybrid.config import TRACKER_FILE, load_config, rules
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.tokenizer import NullTokenizer
from megatron_hybrid.errors import UserError
from megatron_hybrid.evaluation.own_data import OwnData
from megatron_hybrid.evaluation.run import Asked, _figures, keep, open_evaluation
from megatron_hybrid.evaluation.sources import find_texts, find_tokens
from megatron_hybrid.training.metrics import read_records

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
    changed: list[bool] = []
    monkeypatch.setattr(OwnData, "find", lambda *_, **how: changed.append(how["changed"]))
    for words in ([], ["data.seq_length=8"], ["data.split=1,1,1"], ["--split", "1,1,1"]):
        open_evaluation(folder, Asked(), words, world_size=1)
    assert changed == [False, True, True, True]


def test_a_record_is_kept_with_the_run(tmp_path: Path) -> None:
    """After what is there; nowhere, where there is no run."""
    folder = tmp_path / "checkpoints" / "iter_0000003"
    folder.mkdir(parents=True)
    record = {"kind": "evaluation", "iteration": 3}
    assert keep(record, folder) is None
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind":"event","iteration":1}\n')
    assert keep(record, folder) == path
    assert read_records(path)[1:] == [record]
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
