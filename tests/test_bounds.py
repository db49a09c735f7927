"""Values that nobody means: every field of a config and every option of every command takes them,
or refuses them in one clear message; found by introspection, so that a new one is tried too."""

import ast
import copy
import errno
import inspect
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import typer
from pydantic import BaseModel
from typer.testing import CliRunner

import megatron_hybrid
from launchers.errors import ERROR_FILE, read_error
from megatron_hybrid import cli
from megatron_hybrid.commands.app import App
from megatron_hybrid.config import RunConfig, build_config, load_config, rules
from megatron_hybrid.config.base import Far
from megatron_hybrid.config.describe import field_at, plain_type
from megatron_hybrid.config.yaml_text import parse_yaml
from megatron_hybrid.errors import ConfigError, UserError
from megatron_hybrid.fileio import file_errors, matches, refusal, refusals_told, why_not_writable
from megatron_hybrid.json_text import MOST_DEPTH, parse_json
from tests.config import GOOD

LONG = 5000
NUMBERS: list[Any] = [
    float("nan"), float("inf"), -1, 0, 1e-40, 1e40, 2**31, 10**30,
]  # fmt: skip
TEXTS: list[Any] = [
    "", "x" * LONG, "M" * LONG, "a/" * LONG, " " * LONG, "x" * 300, "a\0b", "a\udc80", "\n",
    "1,nan,1",
]  # fmt: skip
OTHERS: list[Any] = [
    None, True, [], {}, [[[[1]]]], [1e40] * 300, [10**30], ["a\0b"], [[1e40, 10**30]],
    {"a": {"b": 1e40}}, {"web": 1e40}, {"web": float("nan")}, {"x" * LONG: 1}, {"web": {}},
]  # fmt: skip


def leaves(kind: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every field of a section, and of the sections in its mappings and lists."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, UnionType):
        for inner in get_args(kind):
            yield from leaves(inner, place)
    elif get_origin(kind) is dict:
        yield from leaves(get_args(kind)[1], (*place, NAMED.get(str(place[-1]), "web")))
    elif get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis:
        yield from leaves(get_args(kind)[0], (*place, 0))
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            yield (*place, name)
            yield from leaves(field.annotation, (*place, name))


# An entry of each mapping; of others: "web".
NAMED = {"layers": "3"}
PLACES = sorted(
    {place for place in leaves(RunConfig) if place[-1] not in ("web", *NAMED.values())}, key=str
)


def good() -> dict[str, Any]:
    """A config with sources, phases and sizes of a layer, so that their fields have a place."""
    values = load_config(GOOD).model_dump(mode="json")
    values["model"]["layers"] = {"3": {}}
    values["data"] |= {
        "mock_data": False, "data_path": None, "sources": {"web": {"path": ["some/web"]}},
        "phases": [{"name": "all", "weights": {"web": 1.0}}],
    }  # fmt: skip
    return values


def put(values: Any, place: tuple[Any, ...], value: object) -> None:
    """Set a value that has a place."""
    for part in place[:-1]:
        values = values[part]
    values[place[-1]] = value


def test_the_fields_are_found() -> None:
    """All sections, those in mappings and lists too."""
    assert len(PLACES) > 150
    assert ("data", "sources", "web", "max_epochs") in PLACES
    assert ("data", "phases", 0, "seq_length") in PLACES


SECTIONS = sorted({place[0] for place in PLACES})


def values_for(place: tuple[Any, ...]) -> list[Any]:
    """Many of the field's own type, and one of each other."""
    kind = plain_type(field_at(place)[0])  # type: ignore[arg-type]
    if kind in (int, float):
        return [*NUMBERS, "x" * LONG, "a\0b", OTHERS[4]]
    if kind in (str, Path):
        return [*TEXTS, 10**30, OTHERS[4]]
    if kind is bool or get_origin(kind) is Literal:
        return [10**30, "x" * LONG, OTHERS[4]]
    return [*OTHERS, float("nan"), 10**30, "x" * LONG, "a\0b"]


@pytest.mark.parametrize("section", SECTIONS)
def test_no_value_of_a_field_ends_in_a_traceback(section: str) -> None:
    """Each field with each value makes a config, or one error of a readable length; with rules."""
    whole = good()
    for place in (place for place in PLACES if place[0] == section):
        for value in values_for(place):
            values = copy.deepcopy(whole)
            put(values, place, value)
            try:
                build_config(values, which=rules.NO_FILES, world_size=4, has_cuda=False).to_yaml()
            except ConfigError as error:
                assert 0 < len(str(error)) < 20_000, place
                str(error).encode(errors="backslashreplace")


def numbers_and_texts() -> Iterator[tuple[str, Any, list[Any]]]:
    """Every field of plain numbers, text or a path, with its type and its bounds."""

    def of(kind: Any, place: str, bounds: list[Any]) -> Iterator[tuple[str, Any, list[Any]]]:
        if get_origin(kind) is Annotated:
            inner, *more = get_args(kind)
            yield from of(inner, place, [*bounds, *more])
        elif get_origin(kind) in (Union, UnionType, tuple, dict):
            for inner in get_args(kind):
                yield from of(inner, place, bounds if get_origin(kind) is not tuple else [])
        elif kind in (int, float, str, Path):
            yield place, kind, bounds
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            for name, field in kind.model_fields.items():
                yield from of(field.annotation, f"{place}.{name}", list(field.metadata))

    return of(RunConfig, "", [])


def bounded_above(kind: Any, bounds: list[Any]) -> bool:
    flat = [item for bound in bounds for item in getattr(bound, "metadata", [bound])]
    ends = any(hasattr(item, name) for item in flat for name in ("le", "lt"))
    return ends or any(isinstance(item, Far) for item in flat)


def test_every_field_has_an_end() -> None:
    """No number without an upper bound, no text without one; weights are divided by their sum."""
    found = list(numbers_and_texts())
    assert len(found) > 90
    open_ended = {place for place, kind, bounds in found if not bounded_above(kind, bounds)}
    assert open_ended <= {".data.data_path", ".data.phases.weights"}


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("data.seq_length=100000000000", "whole number of at least 1 and of at most 2147483647"),
        ("training.global_batch_size=1000000000000000000000000", "of at most 2147483647"),
        ("training.train_samples=9007199254740993", "of at most 9007199254740992"),
        ("training.hang_timeout_s=1e10", "a number above 0 and of at most 1000000000"),
        ("optimizer.adam_eps=1e-40", "a number above 0 and of at least 1e-37"),
        ("optimizer.lr=1e39", "of at most 1e+38"),
        (f"run_dir={'a' * 300}", "a path of names of at most 200 bytes"),
        (f"data.split={'1' * 2000}", "text of at most 1000 characters"),
    ],
)
def test_what_is_said_of_a_bound(word: str, problem: str) -> None:
    """The bound that was passed is told of, and only then."""
    with pytest.raises(ConfigError) as caught:
        load_config([*GOOD, word])
    [said] = caught.value.problems[:1]
    assert said.startswith(f"{word.partition('=')[0]}=")
    assert said.removesuffix(", or null").endswith(problem)
    assert len(said) < 500


def test_large_values_of_real_runs_are_taken() -> None:
    """Of published models and clusters: no bound may come near them."""
    config = load_config(
        [*GOOD, "training.train_tokens=20e12", "data.seq_length=1048576",
         "training.seed=4294967295", "training.global_batch_size=49152",
         "model.rotary_base=45.9e9", "optimizer.adam_eps=1e-20",
         "training.hang_timeout_s=86400", "run_dir=läufe/東京 \N{GRINNING FACE}",
         "model.moe_router_bias_update_rate=1e-6"],
        which=rules.NO_FILES, world_size=12288,
    )  # fmt: skip
    assert config.model.rotary_base == 45_900_000_000


def test_products_have_an_end_too() -> None:
    """Each factor may be far below its bound and the run too long to be counted."""
    with pytest.raises(ConfigError, match="makes a run of 2251799813685248000 tokens; allowed: up"):
        load_config(["tiny", *GOOD[1:], "training.train_samples=8796093022208000",
                     "data.seq_length=256"])  # fmt: skip


@pytest.mark.parametrize(
    ("inner", "depth"),
    [("[", 65), ("{a: ", 65), ("- ", 65), ("{a: ", 500), ("- ", 500), ("[", 100_000)],
)
def test_a_yaml_file_of_brackets(inner: str, depth: int, tmp_path: Path) -> None:
    """One sentence with the file's name, however deep."""
    file = tmp_path / "deep.yaml"
    assert depth > MOST_DEPTH
    file.write_text(inner * depth)
    with pytest.raises(ConfigError, match=re.escape(str(file))):
        load_config([str(file)])


def test_aliases_are_no_way_around() -> None:
    """YAML that names itself, or doubles with every line, is read or refused at once."""
    doubling = "a0: &a0 [x]\n" + "".join(
        f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)
    )
    with pytest.raises(ConfigError) as caught:
        build_config(parse_yaml(doubling) | {"run_dir": parse_yaml(doubling)["a59"]})
    assert len(str(caught.value)) < 50_000
    with pytest.raises(ValueError, match="nested"):
        parse_yaml("a: &a [*a]")


@pytest.mark.parametrize("depth", [MOST_DEPTH + 1, 900, 100_000])
@pytest.mark.parametrize("inner", ["[", '{"a":'])
def test_json_of_brackets(inner: str, depth: int) -> None:
    """Whole or not: a JSONDecodeError, which every reader of a file already names the file for."""
    outer = "]" if inner == "[" else "}"
    for text in (inner * depth, inner * depth + "1" + outer * depth, "9" * 5000):
        with pytest.raises(json.JSONDecodeError):
            parse_json(text)
    assert parse_json(inner * MOST_DEPTH + "1" + outer * MOST_DEPTH)


# Of documents, which may be nested as they like; and of what this program's own processes say.
_OTHER_READERS = {
    "megatron_hybrid/json_text.py", "megatron_hybrid/data/tokenizing/records.py",
    "megatron_hybrid/preflight/nodes.py", "megatron_hybrid/smoke/facts.py",
    "megatron_hybrid/config/yaml_text.py", "megatron_hybrid/platform/imports.py",
}  # fmt: skip


def test_files_are_read_in_one_place() -> None:
    """No other module calls a parser that nesting can break."""
    root = Path(megatron_hybrid.__file__).parent.parent
    found = set()
    for folder in ("megatron_hybrid", "launchers", "checkpoints_converter", "tools"):
        for file in (root / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            calls = re.search(r"(json|yaml)\.\w*load|from (json|yaml) import", text)
            for node in ast.walk(ast.parse(text)) if calls else ():
                assert not (isinstance(node, ast.ImportFrom) and node.module in ("json", "yaml"))
                call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                if re.fullmatch(r"(json\.loads?|yaml\.\w*load\w*)", call):
                    found.add(str(file.relative_to(root)))
    assert found == _OTHER_READERS


def test_folders_that_cannot_be_made() -> None:
    """Permissions say nothing of /proc; what is not on a disk is tried."""
    assert "nothing can be made in /proc" in (why_not_writable(Path("/proc/x/y")) or "")
    with pytest.raises(ConfigError, match=r"run_dir=/proc/x: nothing can be made in /proc"):
        load_config([*GOOD, "run_dir=/proc/x"])


# Every way to name a file that costs no more than the command line itself; {} is a folder in which
# the system refuses to look, as it does below one that may not be searched.
NOT_TO_BE_SEEN = (
    "pretrain {}/run.yaml", "pretrain {}/run", "pretrain --load {}/run", "counts {}/run",
    "pretrain tiny --mock-data --dry-run checkpoint.load={}/run",
    "pretrain tiny --mock-data --dry-run run_dir={}/run",
    "pretrain tiny --dry-run data.tokenizer_model={}/tokenizer.model data.data_path={}/web",
    "data plan tiny --tokenizer-type null model.vocab_size=64 data.data_path={}/web",
    "submit tiny --nodes 1 --template {}/pretrain.sbatch", "status {}", "status {}/run",
    "data tokenize --input {}/web.jsonl --output web --tokenizer-type null --vocab-size 9",
    "data tokenize --input {}/*.jsonl --output web --tokenizer-type null --vocab-size 9",
    "data plan tiny --tokenizer-type null model.vocab_size=64 data.data_path={}/web*",
    "data verify {}/web", "data stats {}/web*", "data show {}/web 0",
    "data tokenize --input x --output {}/web --tokenizer-type null --vocab-size 9",
    "data tokenize --input x --output web --tokenizer-type huggingface --tokenizer-model {}/it",
    "data tokenize --input x --output web --tokenizer-type sentencepiece --tokenizer-model {}/it",
)  # fmt: skip


@pytest.mark.parametrize("words", NOT_TO_BE_SEEN)
def test_where_the_system_refuses_to_look(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One message with the path and the system's reason; nobody, not even root, may look there."""
    place = tmp_path / "place"
    place.symlink_to("x" * 300)
    (tmp_path / "x").write_text('{"text": "1"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("megatron_hybrid"), "handlers", [])
    monkeypatch.setattr("sys.argv", ["megatron-hybrid", *words.format(*[place] * 2).split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.startswith("error: ")
    assert said.count("File name too long") == words.count("{}")
    assert str(place) in said


def test_a_glob_passes_over_no_folder(tmp_path: Path) -> None:
    """One of several that may not be looked into would be left out of a source in silence."""
    for name in ("a/web.idx", "b/web.idx", "b/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = [str(tmp_path / name / "web.idx") for name in "ab"]
    for pattern in ("*/web.idx", "*/w*.idx", "**/web.idx", "[ab]/web*"):
        assert matches(f"{tmp_path}/{pattern}", recursive=True) == expected
    assert matches(f"{tmp_path}/c/web*") == matches(f"{tmp_path}/b/x/w*") == []
    (tmp_path / "c").symlink_to("x" * 300)
    for pattern in ("*/web.idx", "*/w*.idx"):
        with pytest.raises(OSError, match="File name too long"):
            matches(f"{tmp_path}/{pattern}")


def test_files_that_are_read_for_another(tmp_path: Path) -> None:
    """What cannot be read is told as such; what is made at, below or beside a place as the
    place's."""
    target = tmp_path / "new" / "out"
    source = tmp_path / "checkpoints" / "out" / "metadata.json"
    for name, begins in {
        tmp_path / "new": f"{target} could not be written: ",
        target / "x": f"{target} could not be written: ",
        tmp_path / "new" / ".out.part" / "a" / "b": f"{target} could not be written: ",
        source: f"{source}: Permission denied",
    }.items():  # fmt: skip
        with pytest.raises(UserError) as told, file_errors(target):
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        assert str(told.value).startswith(begins)


def test_a_rank_keeps_the_traceback_of_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes where the launcher finds it, whole."""
    (tmp_path / "place").symlink_to("x" * 300)
    monkeypatch.setattr(logging.getLogger("megatron_hybrid"), "handlers", [])
    monkeypatch.setattr("sys.argv", ["megatron-hybrid", "status", str(tmp_path / "place")])
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        cli.main()
    error = read_error(tmp_path / "error.json")
    assert error and error.text.startswith("Traceback ")
    assert error.summary.startswith("OSError: [Errno 36] File name too long")


def test_the_home_folder_in_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell expands `--output=~/x`; where there is no such user, it is a name like any other."""
    monkeypatch.setenv("HOME", str(tmp_path))
    seen: list[Path] = []
    app = App()

    @app.command()
    def draw(output: Path) -> None:
        seen.append(output)

    for word in ("~/x", "~", "~nobody-of-that-name/x", "a/~/x"):
        assert CliRunner().invoke(app, [word]).exit_code == 0
    assert seen == [tmp_path / "x", tmp_path, Path("~nobody-of-that-name/x"), Path("a/~/x")]


def test_what_is_no_refusal_keeps_its_traceback() -> None:
    """Of a closed pipe, of what has no file, of our own faults, the place in the code says more."""
    for error in (BrokenPipeError(32, "Broken pipe", "x"), OSError("no file"), ValueError("x")):
        assert refusal(error) is None
        with pytest.raises(type(error)), refusals_told():
            raise error
    both = OSError(13, "Permission denied", "a", None, b"b")
    assert refusal(both) == "a to b: Permission denied"


def commands() -> dict[str, Any]:
    """Every command by the words that call it."""
    found = {}

    def walk(app: typer.Typer, words: str) -> None:
        assert isinstance(app, App), f"the options of {words or 'the program'} have no bounds"
        for info in app.registered_commands:
            assert info.callback is not None
            name = info.name or info.callback.__name__.replace("_", "-")
            found[f"{words}{name}"] = info.callback
        for group in app.registered_groups:
            walk(group.typer_instance, f"{words}{group.name} ")

    walk(cli.app, "")
    return found


COMMANDS = commands()
WORDS = [
    "nan", "inf", "-inf", "-1", "0", "1e40", "1e-40", "0.5", str(10**30), str(-(10**30)),
    str(2**40), "1e400", "9" * 400, "9" * 400 + "GB", "x" * LONG, "a/" * LONG, "a\0b",
    "a\udc80", "",
]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_ends_in_a_traceback(name: str) -> None:
    """Each option and argument of each command with each word: the command would begin with a
    value within bounds, or a usage error names the option."""
    seen: list[dict[str, Any]] = []
    function = COMMANDS[name]

    def begin(**values: Any) -> None:
        seen.append(values)

    app = App()
    options = {"allow_extra_args": True}
    begin.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    begin.__annotations__ = dict(function.__annotations__) | {"return": None}
    app.command("it", context_settings=options, add_help_option=False)(begin)
    app.command("other")(lambda: None)
    command = typer.main.get_command(app).commands["it"]  # type: ignore[attr-defined]
    needed = []
    for parameter in command.params:
        if parameter.required:
            word = "1" if "int" in str(function.__annotations__[parameter.name]) else "null"
            flag = [parameter.opts[0]] if parameter.param_type_name == "option" else []
            needed.append((parameter.name, [*flag, word]))
    command.main([word for _, words in needed for word in words], standalone_mode=False)
    assert seen, "a default is beyond a bound"
    for parameter in command.params:
        if getattr(parameter, "is_flag", False) or parameter.hidden:
            continue
        option = parameter.param_type_name == "option"
        rest = [word for own, words in needed if own != parameter.name for word in words]
        for word in WORDS:
            typed = [f"{parameter.opts[0]}={word}"] if option else ["--", word]
            seen.clear()
            try:
                command.main([*rest, *typed], standalone_mode=False)
            except Exception as error:
                # A usage error, which the program prints with the option's name, and ends with 2.
                assert getattr(error, "exit_code", None) == 2, (typed, error)
                assert len(error.format_message()) < 3 * LONG  # type: ignore[attr-defined]
            value = seen[0].get(parameter.name) if seen else None
            if isinstance(value, float):
                assert value == 0 or 1e-37 <= abs(value) <= 1e38, typed
            if isinstance(value, int):
                assert abs(value) < 2**53, typed


def test_options_are_checked_where_the_program_is_called() -> None:
    """The real commands, with the issue's own words: refused before anything is loaded."""
    runner = CliRunner()
    for words in (
        ["--temperature", "nan"], ["--temperature", "1e-40"], ["--top-p", "nan"],
        ["--seed", "1180591620717411303424"], ["--max-new-tokens", "1000000000000"],
    ):  # fmt: skip
        done = runner.invoke(cli.app, ["generate", "nowhere", "--prompt", "a", *words])
        assert done.exit_code == 2
        assert words[0] in done.output
    named = ["data", "tokenize", "--input", "x", "--tokenizer-type", "null", "--output", "a" * 300]
    done = runner.invoke(cli.app, named)
    assert done.exit_code == 2
    assert "200 bytes" in done.output


def test_made_up_samples_of_one_token() -> None:
    """The smallest that a config may ask for: a token and its label."""
    from megatron_hybrid.data.mock import MockWindows

    windows = MockWindows(size=50, seq_length=1, vocab_size=2, eod=1, seed=(7,))
    rows = windows.__getitems__(range(50))
    assert rows.shape == (50, 2)
    assert set(rows.ravel().tolist()) == {0, 1}
