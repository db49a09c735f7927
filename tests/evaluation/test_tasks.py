"""lm-eval's own harness with a model of ours, through Python and through the server, beside
transformers with the same weights.
"""

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from checkpoints_converter.importing import ImportOptions, import_model
from megatron_hybrid import cli
from megatron_hybrid.checkpoint.saved_here import remember, stamp
from megatron_hybrid.data.tokenizer import load_tokenizer
from megatron_hybrid.errors import UserError
from megatron_hybrid.evaluation.task_run import evaluate_tasks, open_model
from megatron_hybrid.evaluation.tasks import AskedTasks, Tasks, unknown, unread
from megatron_hybrid.generation import Generator
from megatron_hybrid.testing import run_distributed
from megatron_hybrid.training.metrics import METRICS_FILE, read_records, scalars
from tests.checkpoints_converter.peer_models import nemotron_h, saved
from tests.data.tokenizer_files import FAST_KINDS, save_kind
from tests.generation.test_server import while_served
from tests.training.runs import losses, records, trainer, words

LENGTH = 48  # of which some questions with their examples are longer
NAMES = ("pets", "say", "book")
QUESTIONS = 24
WORDS = ("red", "blue", "green", "seven", "cats", "dogs", "sit", "run", "far", "near", "the", "a")


ENDS = ["\n", " the"]
NEW_TOKENS = 8
SHORT = 40  # characters of a question that is not cut, as the client of servers cuts otherwise


def texts(draws: random.Random, count: int) -> str:
    return " ".join(draws.choice(WORDS) for _ in range(count))


def write_tasks(folder: Path, answers: list[str] | None = None) -> Path:
    """Choices of one token and of several after the same question; answers; whole texts.

    Args:
        answers: right ones, for every second question.
    """
    folder.mkdir()
    draws = random.Random(1)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    for number in range(QUESTIONS):
        choices = [texts(draws, n) for n in (1, 1, 3)]
        question = texts(draws, draws.randrange(1, 30))
        rows["pets"].append({"q": question, "choices": choices, "gold": draws.randrange(3)})
        right = answers is not None and number % 2
        gold = answers[number] if answers is not None and right else "nothing"
        rows["say"].append({"q": question[:SHORT], "gold": gold})
        rows["book"].append({"text": texts(draws, draws.randrange(1, 90))})
    tasks = {
        "pets": "output_type: multiple_choice\ndoc_to_text: 'Q: {{q}} A:'\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc}, {metric: acc_norm}]\nnum_fewshot: 1\n"
        "fewshot_split: test",
        "say": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: gold\n"
        f"generation_kwargs: {{until: {json.dumps(ENDS)}, max_gen_toks: {NEW_TOKENS}}}\n"
        "metric_list: [{metric: exact_match}]",
        "book": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]",
    }
    for name, task in tasks.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\nmetadata: {{version: 2}}\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n{task}\n"
        )
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of transformers with its tokenizer, and the checkpoint that is made of it."""
    folder = tmp_path_factory.mktemp("both")
    source = saved(
        nemotron_h("M*E-", vocab_size=1000, bos_token_id=None, eos_token_id=1), folder / "hf"
    )
    save_kind(FAST_KINDS["gpt2"](), source)
    config = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    return source, import_model(source, folder / "ours", ImportOptions()).folder


def their_answers(source: Path) -> list[str]:
    """What transformers writes after each question of "say"."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    draws, found = random.Random(1), []
    for _ in range(QUESTIONS):
        [texts(draws, n) for n in (1, 1, 3)]
        question = texts(draws, draws.randrange(1, 30))[:SHORT]
        ids = tokenizer(question, return_tensors="pt").input_ids
        draws.randrange(3)
        texts(draws, draws.randrange(1, 90))
        new = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        for end in ENDS:
            text = text.partition(end)[0]
        found.append(text)
    return found


def all_ways(source: Path, ours: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """On a rank: the records of the tasks, by each way of asking the same model."""
    torch.distributed.destroy_process_group()  # generation makes its own
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # by which accelerate would make one, too
        os.environ.pop(name, None)
    asked = AskedTasks(NAMES, [write_tasks(folder / "tasks", their_answers(source))])
    tasks = Tasks(asked)
    opened = open_model(ours, asked, [f"data.seq_length={LENGTH}"], world_size=1)
    told: list[tuple[str, int, int]] = []
    found = {}
    for name, batch_size in (("python", 5), ("again", 1)):
        record = evaluate_tasks(
            opened, tasks, batch_size, ranks=1, told=lambda *each: told.append(each)
        )
        assert record is not None
        found[name] = record
    line = ["--tasks", "pets, book", "--include-path", str(folder / "tasks"), "--limit", "3"]
    (ours.parent / METRICS_FILE).touch()
    remember(opened.folder.parent, opened.folder.name, stamp(opened.folder))  # as a run does
    for more in ([], ["--json"]):
        words = ["evaluate", str(ours), *line, *more, f"data.seq_length={LENGTH}"]
        done = CliRunner().invoke(cli.app, words)
        assert done.exit_code == 0, (done.output, done.exception)
        found[" ".join(["command", *more])] = done.stdout
    assert told[QUESTIONS * 3 - 1] == ("loglikelihood", QUESTIONS * 3, QUESTIONS * 3)
    found["transformers"] = by_harness(
        asked, model="hf",
        model_args={"pretrained": str(source), "max_length": LENGTH, "device": "cpu",
                    "dtype": "float32", "batch_size": 4},
    )  # fmt: skip
    with Generator.of_checkpoint(opened.config, opened.folder, opened.tokenizer) as generator:
        found["server"] = while_served(generator, lambda server: by_harness(
            asked, model="local-completions",
            model_args={
                "base_url": f"http://127.0.0.1:{server.socket.getsockname()[1]}/v1/completions",
                # Of which this client keeps two: for a new token, and for one of windows.
                "model": "small", "tokenizer": str(source), "max_length": LENGTH + 2,
                "tokenizer_backend": "huggingface", "num_concurrent": 1, "batch_size": 4,
            },
        ))  # fmt: skip
    return found


def by_harness(asked: AskedTasks, **model: Any) -> dict[str, Any]:
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    evaluator.add_env_info = lambda storage: None  # of the machine, by programs: many seconds
    manager = TaskManager(include_path=list(map(str, asked.include_path)), include_defaults=False)
    return evaluator.simple_evaluate(
        tasks=list(NAMES), task_manager=manager, bootstrap_iters=0, **model
    )


def test_each_way_of_asking_gives_the_figures_of_transformers(
    both: tuple[Path, Path], tmp_path: Path
) -> None:
    """Through Python and through the server, in batches of any size, asked again."""
    [found] = run_distributed(all_ways, 1, *both, tmp_path)
    ours = found["python"]
    assert [each["samples"] for each in ours["tasks"].values()] == [QUESTIONS] * len(NAMES)
    assert [each["num_fewshot"] for each in ours["tasks"].values()] == [1, 0, 0]
    want = {name: told_figures(each) for name, each in found["transformers"]["results"].items()}
    assert set(want) == set(NAMES)
    # Neither all right nor all wrong: a figure that tells something.
    assert 0 < want["pets"]["acc"] < 1 and 0.4 < want["say"]["exact_match"] <= 0.6
    for way in ("python", "again"):
        for name, figures in want.items():
            got = found[way]["tasks"][name]["metrics"]
            assert {key: got[key] for key in figures} == pytest.approx(figures, rel=1e-6), way
    [_, record] = read_records(both[1].parent / METRICS_FILE)
    assert record == json.loads(found["command --json"])
    assert {name: each["samples"] for name, each in record["tasks"].items()} == {
        "pets": 3, "book": 3
    }  # fmt: skip
    assert f"{record['tasks']['pets']['metrics']['acc']:.4f}" in found["command"]
    for name in NAMES:
        served = told_figures(found["server"]["results"][name])
        assert served == pytest.approx(want[name], rel=1e-6), name


def told_figures(results: dict[str, Any]) -> dict[str, float]:
    """Of lm-eval's results of a task: metrics without their errors."""
    return {
        key.removesuffix(",none"): value
        for key, value in results.items()
        if key.endswith(",none") and "_stderr" not in key
    }


def trained_and_asked(
    lines: list[list[str]], checkpoints: list[Path], asked: AskedTasks
) -> list[dict[str, Any] | None]:
    """On a rank: runs to their ends, and on the first the records of their checkpoints."""
    first = torch.distributed.get_rank() == 0
    for line in lines:
        with trainer(line) as run:
            assert run.run() == "finished"
    torch.distributed.destroy_process_group()  # generation makes its own
    return [of_checkpoint(each, asked) for each in checkpoints] if first else []


def of_checkpoint(checkpoint: Path, asked: AskedTasks) -> dict[str, Any] | None:
    opened = open_model(checkpoint, asked, [], world_size=1)
    return evaluate_tasks(opened, Tasks(asked), 3, ranks=1, told=lambda *_: None)


def test_tasks_of_a_run_are_those_of_its_checkpoints_and_change_nothing(
    both: tuple[Path, Path], tmp_path: Path
) -> None:
    """In TP2 and in DP2: the losses are the same bits as without, the figures those that the
    checkpoint has."""
    folder = write_tasks(tmp_path / "tasks")
    common = [
        "data.tokenizer_type=huggingface", f"data.tokenizer_model={both[0]}",
        "model.vocab_size=1000", "training.eval_interval=2", "training.eval_iters=1",
        "model.hidden_dropout=0.1", "optimizer.lr=0.05",
    ]  # fmt: skip
    asks = ["training.eval_tasks=[pets]", "training.eval_tasks_limit=4",
            f"training.eval_tasks_include_path={folder}"]  # fmt: skip
    split = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    runs = {"dp": [], "tp": split, "asked dp": asks, "asked tp": [*split, *asks]}
    lines = [words(tmp_path / n, *common, *w) for n, w in runs.items()]
    asking = [tmp_path / "asked dp", tmp_path / "asked tp"]
    checkpoints = [each / "checkpoints" for each in asking]
    asked = AskedTasks(["pets"], [folder], limit=4)
    found = run_distributed(trained_and_asked, 2, lines, checkpoints, asked)[0]
    for name, own, record in zip(("dp", "tp"), asking, found, strict=True):
        assert losses(own) == losses(tmp_path / name)
        told = records(own, "tasks")
        assert [record["iteration"] for record in told] == [2, 4]
        assert record is not None and record["tasks"] == told[1]["tasks"]
        assert scalars(told[1])["tasks/pets/acc"] == record["tasks"]["pets"]["metrics"]["acc"]


def write_more(folder: Path, name: str, *changes: tuple[str, str], of: str = "say") -> None:
    """Another task, by the text of one that is there."""
    text = (folder / f"{of}.yaml").read_text().replace(f"task: {of}", f"task: {name}")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / f"{name}.yaml").write_text(text)


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    """Names, folders, files that are none, what runs programs."""
    from lm_eval.tasks import TaskManager

    folder = write_tasks(tmp_path / "tasks")
    write_more(folder, "unsafe", ("task: unsafe", "task: unsafe\nunsafe_code: true"))
    write_more(folder, "gone", ("say.jsonl", "gone.jsonl"))
    write_more(folder, "empty", ("say.jsonl", "empty.jsonl"))
    (folder / "empty.jsonl").touch()
    (folder / "torn.yaml").write_text("task: torn\n  x: [")
    write_more(folder, "twice", ("task: twice", "task: say"), ("toks: 8", "toks: 9"))
    for asked, problem in (
        (AskedTasks(["pets"], [tmp_path / "x", folder / "say.yaml"]),
         rf"{tmp_path}/x is no folder of tasks\n.*say\.yaml is no folder"),
        (AskedTasks(["unsafe", "pets"], [folder]), "task unsafe runs what a model writes as a pro"),
        (AskedTasks(["gone", "empty"], [folder]),
         r"task gone cannot be loaded: FileNotFoundError: .*gone.*\n.*empty .*: it has no documen"),
        (AskedTasks(["say", str(folder / "twice.yaml")], [folder]), r"say of .*twice\.yaml is a"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=problem):
            Tasks(asked)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    assert f"{folder}/torn.yaml cannot be read as a task: Scann" in unread(
        manager, "torn", [folder]
    )
    assert Tasks(AskedTasks([str(folder / "say.yaml")])).names == ["say"]
    close = unknown("pts", ["pets", "say"])
    assert close.startswith("no task, group or tag is called pts, and no file; similar: pets; allo")


def test_what_no_model_could_be_asked_is_refused_before_there_is_one(
    both: tuple[Path, Path], tmp_path: Path
) -> None:
    """Of each task: settings and lengths of answers, texts without a token; what it may be asked
    is not, though it is named by itself, by its group and by its tag."""
    folder = write_tasks(tmp_path / "tasks")
    write_more(folder, "beams", ("toks: 8", "toks: 8, num_beams: 3"))
    write_more(folder, "room", ("toks: 8", f"toks: {LENGTH}"))
    for name, context, choice in (
        ("blank", "  ", "red"), ("long", "red", "red " * 2 * LENGTH), ("fits", "", "red"),
        ("few", "Q: red", "red"),
    ):  # fmt: skip
        row = {"q": context, "choices": [choice, "the"], "gold": 0}
        (folder / f"{name}.jsonl").write_text(json.dumps(row))
        few = ("test", "test") if name == "few" else ("num_fewshot: 1", "num_fewshot: 0")
        changes = (("pets.jsonl", f"{name}.jsonl"), ("'Q: {{q}} A:'", "'{{q}}'"), few)
        write_more(folder, name, *changes, of="pets")
    fits = folder / "fits.yaml"
    fits.write_text(f"{fits.read_text()}\ntag: small\n")
    (folder / "group.yaml").write_text("group: group\ntask: [fits, say]\n")
    tokenizer = load_tokenizer(both[1])
    asked = Tasks(AskedTasks(["fits", "group", "small", "pets", "say"], [folder], num_fewshot=2))
    asked.check(tokenizer, LENGTH)
    assert sorted(asked.names) == ["fits", "pets", "say"]
    names = ["beams", "room", "blank", "long", "few"]
    with pytest.raises(UserError) as caught:
        Tasks(AskedTasks(names, [folder])).check(tokenizer, LENGTH)
    told = str(caught.value).splitlines()
    for line, problem in zip(told, (
        r"task beams, document 0: generation_kwargs\.num_beams=3 is not supported; allowed: do_sa",
        rf"task room, document 0: an answer of max_gen_toks={LENGTH} has no room for a context",
        r"task blank, document 0: the context '  ' is of blanks alone",
        r"task long, document 0: a continuation of \d+ tokens has no room for a context; allowed:",
        r"task few: ValueError: Sample larger than population",
    ), strict=True):  # fmt: skip
        assert re.match(problem, line)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--tasks x --input a", "--input: not with --tasks"),
        ("--tasks x --overlap 3", "--overlap: not with --tasks"),
        ("--limit 3", "--limit: only with --tasks"),
        ("--apply-chat-template", "--apply-chat-template: only with --tasks"),
        ("--tasks ,", "--tasks: it names none"),
        ("--parse-special-tokens", "only with --input or --tasks"),
    ],
)
def test_options_that_nothing_would_read_are_refused(words: str, hint: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["evaluate", str(tmp_path), *words.split()])
    assert done.exit_code == 2 and hint in " ".join(done.output.replace("│", " ").split())
