"""`convert verify`, and what it promises: a process without our code writes the same text."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_converter.errors import ConversionError
from megatron_hybrid.testing import run_distributed
from tests.checkpoints_converter.conftest import run_cli

PROMPTS = ("the quick brown", "def double(x):\n")
NEW_TOKENS = 24
# Greedy text of transformers, where nothing of ours can be imported.
THEIR_TEXT = """
import json, sys
class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("megatron", "megatron_hybrid", "checkpoints_converter"):
            raise ImportError(name + " must not be needed")
sys.meta_path.insert(0, Refuse())
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, new_tokens, *prompts = sys.argv[1:]
model, tokenizer = (it.from_pretrained(folder) for it in (AutoModelForCausalLM, AutoTokenizer))
found = []
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    ids = model.generate(**inputs, max_new_tokens=int(new_tokens), do_sample=False)
    found.append(ids[0, inputs.input_ids.shape[1]:].tolist())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    done = run_cli("convert", "to-hf", trained, out)
    assert done.returncode == 0, done.stderr
    return out


def our_text(run: Path, prompts: Sequence[str]) -> list[list[int]]:
    """On a rank: our greedy continuations, and the token that ends them."""
    from megatron_hybrid.generation import Generator, SamplingParams

    torch.distributed.destroy_process_group()  # generation makes its own
    with Generator(run / "checkpoints") as generator:
        tokenizer, found = generator.tokenizer, []
        for prompt in prompts:
            [[completion]] = generator.generate([prompt], SamplingParams(max_new_tokens=NEW_TOKENS))
            ids = completion.tokens
            found.append(ids if len(ids) == NEW_TOKENS else [*ids, tokenizer.eod])
        return found


def test_text_without_our_code(trained: Path, exported: Path) -> None:
    """AutoModelForCausalLM and AutoTokenizer write the tokens that we write, and stop there too."""
    done = subprocess.run(
        [sys.executable, "-c", THEIR_TEXT, exported, str(NEW_TOKENS), *PROMPTS],
        env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours = run_distributed(our_text, 1, trained, PROMPTS)[0]
    assert json.loads(done.stdout.splitlines()[-1]) == ours
    assert len({tuple(ids) for ids in ours}) == len(PROMPTS), "one text for all proves nothing"


def test_command_passes_on_an_export(trained: Path, exported: Path) -> None:
    """Every layer, the logits, both against the arbiter, and the text of the prompts; status 0."""
    done = run_cli("convert", "verify", trained, exported, "--json", "--prompt", PROMPTS[0])
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    parts = [row["part"] for row in found["rows"]]
    assert parts == [
        *(f"layer {i}" for i in range(6)), "logits", "ours logits", "transformers' logits"
    ]  # fmt: skip
    assert all(row["relative"] <= 1e-5 for row in found["rows"][:7])
    assert found["texts"][0]["prompt"] == repr(PROMPTS[0])
    assert {text["verdict"] for text in found["texts"]} == {"same"}
    lengths = [text["prompt_tokens"] for text in found["texts"]]
    chunk_size = json.loads((exported / "config.json").read_text())["chunk_size"]
    assert max(lengths) > chunk_size and max(lengths) % chunk_size


def reports(trained: Path, exports: Sequence[Path]) -> list[Any]:
    """On a rank: what verify says of several exports; the text of an error."""
    from checkpoints_converter.verify import verify

    torch.distributed.destroy_process_group()  # it makes its own
    found: list[Any] = []
    for export in exports:
        try:
            found.append(json.loads(verify(trained, export, max_new_tokens=4).to_json()))
        except ConversionError as error:
            found.append(str(error))
    return found


def damaged(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], to: Path) -> Path:
    """A copy of an export whose tensors were changed."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors")
    return to


def test_finds_what_is_wrong(trained: Path, exported: Path, tmp_path: Path) -> None:
    """A changed number is found in its layer; swapped heads, a missing tensor, another end token.

    bf16 weights pass: ours are rounded as they were.
    """

    def swap_heads(tensors: dict[str, torch.Tensor]) -> None:
        keys = tensors["backbone.layers.3.mixer.k_proj.weight"]
        tensors["backbone.layers.3.mixer.k_proj.weight"] = keys.roll(10, 0)

    def change_one(tensors: dict[str, torch.Tensor]) -> None:
        tensors["backbone.layers.2.mixer.A_log"][1] += 0.01

    def all_but_decays_in_bf16(tensors: dict[str, torch.Tensor]) -> None:
        fp32 = ("A_log", "mixer.D", "dt_bias", "e_score_correction_bias")
        for name, tensor in tensors.items():
            if not name.endswith(fp32):
                tensors[name] = tensor.bfloat16()

    folders = [
        damaged(exported, swap_heads, tmp_path / "heads"),
        damaged(exported, change_one, tmp_path / "number"),
        damaged(exported, lambda t: t.pop("backbone.norm_f.weight"), tmp_path / "missing"),
        damaged(exported, all_but_decays_in_bf16, tmp_path / "bf16"),
        damaged(exported, lambda tensors: None, tmp_path / "end"),
    ]
    settings = folders[-1] / "generation_config.json"
    settings.write_text(settings.read_text().replace('"eos_token_id": 1', '"eos_token_id": 7'))
    heads, number, missing, bf16, end = run_distributed(reports, 1, trained, folders)[0]
    assert not heads["passed"] and heads["first_difference"] == "layer 3 (attention)"
    assert not number["passed"] and number["first_difference"] == "layer 2 (Mamba)"
    # The arbiter tells whose fault it is: the files are as transformers computes them.
    assert [row["passed"] for row in number["rows"][-2:]] == [False, True]
    assert "norm_f.weight" in missing
    assert bf16["passed"], bf16
    assert not end["passed"] and "ends texts at 7" in end["problems"][0]


@pytest.mark.parametrize("release", ["5.8.0", "5.12.1", "5.14.1", "4.57.0", None])
def test_refuses_wrong_transformers(release: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases that compute Mamba-2 wrongly, and none at all, with what to do about it."""
    from checkpoints_converter import verify_sides

    def version(name: str) -> str:
        if release is None:
            raise metadata.PackageNotFoundError(name)
        return release

    monkeypatch.setattr(verify_sides, "version", version)
    expected = r"megatron-hybrid\[convert\]" if release is None else f"{release} is installed"
    with pytest.raises(ConversionError, match=expected):
        verify_sides.require_transformers()
