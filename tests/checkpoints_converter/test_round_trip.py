"""What of a folder is neither weights nor config comes back, or is said by name to be lost."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from checkpoints_converter.carried_files import carried_from
from checkpoints_converter.errors import ConversionError
from checkpoints_converter.export import ExportOptions, export
from checkpoints_converter.importing import Imported, ImportOptions, import_model
from checkpoints_converter.loading_order import WEIGHT_FILES
from checkpoints_converter.tokenizer_files import added_beyond
from megatron_hybrid.checkpoint.carried import FOLDER, read_carried
from megatron_hybrid.checkpoint.integrity import write_integrity
from megatron_hybrid.config import RunConfig, UpcyclingConfig, load_config
from megatron_hybrid.data.tokenizer import build_tokenizer
from megatron_hybrid.training.start import Start, open_run
from megatron_hybrid.upcycling.request import Request, upcycled_config
from megatron_hybrid.upcycling.write import Upcycling
from tests.checkpoints_converter.peer_models import VOCAB_SIZE, nemotron_h, saved

SPECIALS = {"eos_token": "<|im_end|>", "bos_token": "<s>", "pad_token": "<pad>"}
GENERATION = {
    "eos_token_id": [57, 58], "bos_token_id": 59, "do_sample": True, "temperature": 0.6,
    "top_p": 0.95, "repetition_penalty": 1.5,
}  # fmt: skip
IDS = {"eos_token_id": [57, 58], "bos_token_id": 59, "pad_token_id": 60}
# Files that a checkpoint can carry, of any name; beside a tokenizer's and a model's own.
OTHERS = {
    "chat_template.jinja": "{{ messages }}", "special_tokens_map.json": "{}", "vocab.txt": "a",
    "additional_chat_templates/tools.jinja": "{{ tools }}", "LICENSE": "free", "README.md": "# it",
    "images/plot.png": "png", ".gitattributes": "*.bin lfs", "a name of nobody's": "x",
    "integrity.json": "{}",
}  # fmt: skip
LOST = (".cache/", "original/consolidated.pth", "pytorch_model.bin")


def write_tokenizer(folder: Path) -> None:
    ids = {f"w{number}": number for number in range(VOCAB_SIZE - 4)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="w0"))
    words.add_special_tokens(["<|im_end|>", "</s>", "<s>", "<pad>"])
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(SPECIALS))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model with all that such a folder may hold."""
    folder = saved(nemotron_h("M-*"), tmp_path_factory.mktemp("chat") / "hf")
    write_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= IDS | {"max_position_embeddings": 131072}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    for name in (*OTHERS, ".cache/lock", *LOST[1:]):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(OTHERS.get(name, ""))
    return folder


@pytest.fixture(scope="module")
def imported(source: Path) -> Imported:
    return import_model(source, source.parent / "imported", ImportOptions())


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_every_file_comes_back_or_is_named(
    source: Path, imported: Imported, tmp_path: Path
) -> None:
    """All that lies in the folder, whatever it is called; twice round is as once."""
    export(imported.folder, tmp_path / "out", ExportOptions())
    before, after = files(source), files(tmp_path / "out")
    notes = "\n".join(imported.notes)
    for name, content in before.items():
        if name == "config.json":
            assert json.loads(after[name]).items() >= IDS.items()
            assert json.loads(after[name])["max_position_embeddings"] == 131072
        elif name == "README.md":
            assert after["source_README.md"] == content
        elif name.startswith(LOST):
            assert next(lost for lost in LOST if name.startswith(lost)) in notes
        else:
            assert after[name] == content, name
    import_model(tmp_path / "out", tmp_path / "again", ImportOptions())
    export(tmp_path / "again", tmp_path / "out", ExportOptions(force=True))
    again = files(tmp_path / "out")
    assert again.keys() == after.keys()
    assert [name for name in after if again[name] != after[name]] == []


@pytest.mark.parametrize(
    ("said", "longest", "positions"),
    [(131072, 64, 131072), (131072, 262144, 262144), (None, 64, 64)],
)
def test_a_model_is_for_the_longest_sequences(
    said: int | None, longest: int, positions: int, imported: Imported, tmp_path: Path
) -> None:
    """Those that it came with, or of the longest phase that it was trained on."""
    folder = tmp_path / "iter_0000001"
    shutil.copytree(imported.folder, folder)
    phases = (f"{{name: p{n}, start_tokens: {n}, weights: {{x: 1}}, seq_length: {length}}}"
              for n, length in (("null", 32), (1, longest), (2, 16)))  # fmt: skip
    line = [str(folder / "run_config.yaml"), "data.seq_length=16", "data.sources={x: {path: x}}",
            f"data.phases=[{', '.join(phases)}]"]  # fmt: skip
    (folder / "run_config.yaml").write_text(load_config(line, which=()).to_yaml())
    carried = folder / "hugging_face" / "config.json"
    values = json.loads(carried.read_text()) | {"max_position_embeddings": said}
    carried.write_text(json.dumps(values))
    export(folder, tmp_path / "out", ExportOptions())
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["max_position_embeddings"] == positions


def test_force_removes_nothing_but_what_an_export_wrote(imported: Imported, tmp_path: Path) -> None:
    """What it carried over is replaced; a file of the user's among it is not."""
    export(imported.folder, tmp_path / "out", ExportOptions())
    (tmp_path / "out" / "images" / "mine.png").write_text("mine")
    with pytest.raises(ConversionError, match=r"also holds images/mine\.png"):
        export(imported.folder, tmp_path / "out", ExportOptions(force=True))


def test_checksums_are_of_carried_files_too(imported: Imported, tmp_path: Path) -> None:
    """Every file of a checkpoint, at any depth and of any name."""
    folder = shutil.copytree(imported.folder, tmp_path / "iter_0000000")
    write_integrity(folder, threads=1)
    names = json.loads((folder / "integrity.json").read_text())["files"].keys()
    assert names == files(folder).keys() - {"integrity.json"}
    assert f"{FOLDER}/integrity.json" in names


def test_weights_of_any_program_are_told_apart(source: Path, tmp_path: Path) -> None:
    """Each pattern of files with weights: not taken for something to carry, but named."""
    folder = shutil.copytree(source, tmp_path / "hf")
    (folder / "deeper").mkdir()
    names = [pattern.replace("*", "other") for pattern in WEIGHT_FILES]
    for name in names:
        (folder / name).write_text("")
        (folder / "deeper" / name).write_text("")
    done = import_model(folder, tmp_path / "out", ImportOptions())
    carried, notes = read_carried(done.folder), "\n".join(done.notes)
    assert [name for name in carried if name.endswith(tuple(names))] == []
    assert [name for name in names if f" {name}" not in notes] == []
    assert [name for name in names if f"deeper/{name}" not in notes] == []


def test_what_is_too_large_is_named(tmp_path: Path) -> None:
    """A file, and all together."""
    for name in ("a.txt", "b.txt", "c.txt", "d.txt", "e.txt"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(64 << 20)
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate((64 << 20) + 1)
    taken, lost = carried_from(tmp_path, ())
    assert list(taken) == ["a.txt", "b.txt", "c.txt", "d.txt"]
    assert lost == [
        "e.txt (with the others, more than 256 MiB)",
        "large.txt (larger than 64 MiB)",
    ]


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        (None, [57, 58]),  # of config.json
        ({"temperature": 0.5}, [57, 58]),
        ({}, [57, 58]),
        ({"eos_token_id": 58}, 58),
    ],
)
def test_generation_config(
    settings: dict[str, Any] | None, ends: Any, source: Path, tmp_path: Path
) -> None:
    """The source's own; where it does not say how a text ends, that is added."""
    folder = shutil.copytree(source, tmp_path / "hf")
    (folder / "generation_config.json").unlink()
    if settings is not None:
        (folder / "generation_config.json").write_text(json.dumps(settings))
    done = import_model(folder, tmp_path / "ours", ImportOptions())
    export(done.folder, tmp_path / "out", ExportOptions())
    after = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert after["eos_token_id"] == ends
    assert after.items() >= (settings or {}).items()


def test_a_damaged_generation_config(source: Path, tmp_path: Path) -> None:
    """Refused by name, before anything is written."""
    folder = shutil.copytree(source, tmp_path / "hf")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"generation_config\.json is damaged"):
        import_model(folder, tmp_path / "out", ImportOptions())


def test_a_tokenizers_own_special_tokens(tmp_path: Path) -> None:
    """A model that was trained here, with a chat model's tokenizer: its template, bos and pad."""
    folder = saved(nemotron_h("M-"), tmp_path / "hf")
    done = import_model(folder, tmp_path / "ours", ImportOptions())
    shutil.rmtree(done.folder / FOLDER)
    write_tokenizer(done.folder)
    (done.folder / "chat_template.jinja").write_text("{{ messages }}")
    export(done.folder, tmp_path / "out", ExportOptions())
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "out" / name).read_text())
        assert found.items() >= (IDS | {"eos_token_id": 57}).items()


def start_from(imported: Imported, run_dir: Path, *words: str) -> Start:
    saved_words = [str(imported.folder / "run_config.yaml"), "data.mock_data=true"]
    load = f"checkpoint.load={imported.folder.parent}"
    config: RunConfig = load_config(
        [*saved_words, load, "checkpoint.finetune=true", f"run_dir={run_dir}", *words]
    )
    return open_run(config, 1)[2]


def test_a_run_carries_them_on(
    imported: Imported, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From the checkpoint that it starts from, or upcycles; not for another tokenizer, which it
    says."""
    carried = read_carried(imported.folder)
    assert start_from(imported, tmp_path / "run").carried == carried
    config = upcycled_config(imported.config, Request(2, 4, 4), tmp_path / "moe", [])
    moe = Upcycling(
        imported.folder, imported.config, config, UpcyclingConfig(), restart_schedule=False
    ).write(tmp_path / "moe")
    assert read_carried(moe.folder) == carried
    # Where the folder has lost its tokenizer, the upcycled model's is that of the config.
    bare = shutil.copytree(imported.folder, tmp_path / "bare" / imported.folder.name)
    for path in bare.glob("*tokenizer*"):
        path.unlink()
    moe = Upcycling(bare, imported.config, config, UpcyclingConfig(), restart_schedule=False).write(
        tmp_path / "bare_moe"
    )
    assert read_carried(moe.folder) == {}
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"w1"', '"another"'))
    with caplog.at_level(logging.WARNING):
        start = start_from(imported, tmp_path / "other", f"data.tokenizer_model={path}")
    assert start.carried == {}
    assert "do not carry on: " in caplog.text and "generation_config.json" in caplog.text


def test_another_end_token_is_said_where_ends_are(
    imported: Imported, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A base model that is fine-tuned with an end of turns: an export says it beside its own ends,
    as the tokenizer's file is the same."""
    write_tokenizer(tmp_path)
    named = json.dumps(SPECIALS | {"eos_token": "<s>"})
    (tmp_path / "tokenizer_config.json").write_text(named)
    with caplog.at_level(logging.WARNING):
        carried = dict(start_from(imported, tmp_path, f"data.tokenizer_model={tmp_path}").carried)
    before = read_carried(imported.folder)
    for name in ("generation_config.json", "config.json"):
        was, now = json.loads(before.pop(name)), json.loads(carried.pop(name))
        assert now == was | {"eos_token_id": [57, 58, 59]}
        assert (
            f"note: {name} of the model ends texts at [57, 58]; from here on also " in caplog.text
        )
    assert carried == before


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_that_a_tokenizer_s_own_file_lacks(file: str, source: Path, tmp_path: Path) -> None:
    """transformers adds them; here a text with them is one of characters, which is said."""
    tokenizer = build_tokenizer("huggingface", source)
    assert added_beyond(source, tokenizer) is None
    shutil.copy(source / "tokenizer_config.json", tmp_path)
    last = tokenizer.vocab_size
    added: dict[str, Any] = {"a": last - 1, "<|tool|>": last, "<|think|>": last + 1}
    if file == "tokenizer_config.json":
        added = {"added_tokens_decoder": {str(n): {"content": text} for text, n in added.items()}}
    (tmp_path / file).write_text(json.dumps(added))
    said = added_beyond(tmp_path, tokenizer)
    assert said is not None
    assert said.startswith(
        "its tokenizer.json lacks 2 tokens that are added beside it, such as '<|t"
    )
