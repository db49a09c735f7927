"""A file of requests: answered in order, once each, whatever ends the process in between."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.errors import UserError
from megatron_hybrid.generation import Generator, Limits, SamplingParams
from megatron_hybrid.generation.batch_file import Answers, Line, answer_file, read_requests
from megatron_hybrid.testing import run_distributed
from tests.generation.models import built, small_config

DEFAULTS = SamplingParams(max_new_tokens=6, logprobs=1)
LIMITS = Limits(max_sequences=3, max_tokens=300, prefill_tokens=16, page_tokens=16)


def write_requests(path: Path, count: int = 12) -> list[dict[str, Any]]:
    lines = [
        {"prompt": " ".join(str((7 * i + j) % 75) for j in range(i % 5 + 1)), "id": f"no {i}",
         "max_new_tokens": 1 + 4 * (i % 3), "temperature": i % 2, "n": 1 + i % 2}
        for i in range(count)
    ]  # fmt: skip
    lines[4] = {"tokens": [3, 4, 5], "prompt_logprobs": True, "stop": ["1"]}
    path.write_text("\n".join(json.dumps(each) for each in lines) + "\n\n")
    return lines


def requests(generator: Generator, path: Path) -> list[Line]:
    return read_requests(path, DEFAULTS, generator.encode, "a model")


def answer(generator: Generator, source: Path, output: Path, die_after: int | None = None) -> int:
    """The exit status of a process that answers; it is killed in the midst where that is asked."""

    def told(answers: Answers) -> None:
        if answers.requests == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        answer_file(generator, requests(generator, source), source, output, told)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_and_resumed(folder: Path) -> tuple[list[str], list[str], list[int]]:
    """On a rank: lines of an unbroken file, of one that was killed twice, and the statuses."""
    source, whole, parts = (folder / name for name in ("in.jsonl", "whole.jsonl", "parts.jsonl"))
    with built(small_config("all kinds"), LIMITS) as generator:
        answers = answer_file(generator, requests(generator, source), source, whole)
        assert (answers.before, answers.requests) == (0, 12)
        statuses = [answer(generator, source, parts, 3)]
        with parts.open("ab") as file:
            file.write(whole.read_bytes().splitlines()[3][:40])  # as a full disk would leave it
        statuses += [answer(generator, source, parts, 5), answer(generator, source, parts)]
        again = answer_file(generator, requests(generator, source), source, parts)
        assert (again.before, again.requests, again.tokens) == (12, 0, 0)
        other = read_requests(source, SamplingParams(seed=5), generator.encode, "a model")
        with pytest.raises(
            UserError, match=r"parts.jsonl line 1 does not answer .*in.jsonl line 1"
        ):
            answer_file(generator, other, source, parts)
        with pytest.raises(UserError, match=r"has more answers than .* requests, 2; allowed"):
            answer_file(generator, requests(generator, source)[:2], source, parts)
        renamed = [replace(each, id="another") for each in requests(generator, source)]
        with pytest.raises(UserError, match=r"parts.jsonl line 1 has id=.*id='another'; allowed"):
            answer_file(generator, renamed, source, parts)
    return whole.read_text().splitlines(), parts.read_text().splitlines(), statuses


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """SIGKILL twice and a torn line: no answer is missing, repeated or out of order."""
    lines = write_requests(tmp_path / "in.jsonl")
    whole, parts, statuses = run_distributed(killed_and_resumed, 1, tmp_path)[0]
    assert statuses == [signal.SIGKILL, signal.SIGKILL, 0]
    assert len(whole) == len(parts) == len(lines)
    assert list(tmp_path.glob(".*")) == []
    for line, one, other in zip(lines, map(json.loads, whole), map(json.loads, parts), strict=True):
        assert one.get("id") == line.get("id")
        assert len(one["completions"]) == line.get("n", 1)
        for mine, theirs in zip(one["completions"], other["completions"], strict=True):
            logprobs = [[each["logprob"] for each in c.pop("logprobs")] for c in (mine, theirs)]
            assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-5)
            assert mine == theirs and mine["end"] in ("eod", "stop", "length")
            assert len(logprobs[0]) == len(mine["tokens"]) <= line.get("max_new_tokens", 6)
    assert [each is None for each in json.loads(whole[4])["prompt_logprobs"]] == [
        True,
        False,
        False,
    ]


def test_every_line_that_is_no_request_is_named(tmp_path: Path) -> None:
    """With its number and reason, all in one message; a file that is not there, too."""
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"prompt": "1"}\n{"prompt": 3}\n[]\n{"prompt": "1", "tokens": [1]}\n{"tokens": [-1]}\n'
        '{"prompt": "1", "top_p": 0, "n": 0}\n{"prompt": "1", "best_of": 2}\n{"prompt\n'
        '{"prompt": "1", "stop": "x"}\n{"prompt": "1", "seed": "x"}\n'
    )
    with pytest.raises(UserError) as error:
        read_requests(path, DEFAULTS, lambda text: [1], "a model")
    said = str(error.value).splitlines()[1:]
    numbers = [int(line.split(" line ")[1].split(":")[0]) for line in said]
    assert numbers == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert "n=0" in said[4] and "top_p=0" in said[4] and "'best_of'; allowed: " in said[5]
    with pytest.raises(UserError, match=r"gone.jsonl cannot be read"):
        read_requests(tmp_path / "gone.jsonl", DEFAULTS, lambda text: [1], "a model")
