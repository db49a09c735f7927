"""A file of requests answered into a file of completions, a line each, in the same order.

What is there already stays: a run that was killed goes on after its last whole line.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.claim import claimed
from megatron_hybrid.errors import ConfigError, UserError
from megatron_hybrid.fileio import file_errors
from megatron_hybrid.generation.generator import Generator, add_event, begun
from megatron_hybrid.generation.params import SamplingParams
from megatron_hybrid.generation.request import Completion, TokenLogprob
from megatron_hybrid.json_text import parse_json
from megatron_hybrid.small_files import naming

_OWN = {field.name for field in fields(SamplingParams)}
_KEYS = {"prompt", "tokens", "id"}


@dataclass(frozen=True)
class Line:
    """One request of a file.

    Attributes:
        number: of its line, from 1.
        tokens: of the prompt.
        id: what the line calls itself, if it does; comes back with the answer.
        digest: of all that its answer depends on.
    """

    number: int
    tokens: NDArray[np.int32]
    params: SamplingParams
    id: Any
    digest: str


def read_requests(
    path: Path, defaults: SamplingParams, encode: Callable[[str], list[int]], model: str
) -> list[Line]:
    """The requests of a file of JSON lines: `prompt` or `tokens`, and any of `SamplingParams`.

    Args:
        defaults: of what a line does not say.
        encode: a text's tokens.
        model: what is to answer; part of the digests.

    Raises:
        UserError: naming the file: it cannot be read, or every line that is no request, and why.
    """
    lines, problems = [], []
    with naming(path), path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                lines.append(_read_line(number, text, defaults, encode, model))
            except (UserError, ValueError, TypeError) as error:
                problems.append(f"{path} line {number}: {str(error).replace(chr(10), '; ')}")
    if problems:
        raise ConfigError(problems)
    return lines


def _read_line(
    number: int,
    text: bytes,
    defaults: SamplingParams,
    encode: Callable[[str], list[int]],
    model: str,
) -> Line:
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError("it must be a JSON object with 'prompt' or 'tokens'")
    if unknown := sorted(content.keys() - _KEYS - _OWN):
        allowed = ", ".join(sorted(_KEYS | _OWN))
        raise ValueError(f"unknown key {unknown[0]!r}; allowed: {allowed}")
    prompt, tokens = content.get("prompt"), content.get("tokens")
    if (prompt is None) == (tokens is None):
        raise ValueError("it must have one of 'prompt' and 'tokens'")
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError("'prompt' must be a text")
    if tokens is not None and not (
        isinstance(tokens, list) and all(type(t) is int and 0 <= t < 2**31 for t in tokens)
    ):
        raise ValueError("'tokens' must be a list of whole numbers of at least 0")
    own = {name: content[name] for name in _OWN & content.keys()}
    if isinstance(own.get("stop"), list):
        own["stop"] = tuple(own["stop"])
    params = SamplingParams(**{**vars(defaults), **own})
    ids = np.array(encode(prompt) if prompt is not None else tokens, np.int32)
    said = json.dumps([model, ids.tolist(), vars(params)], sort_keys=True)
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    return Line(number, ids, params, content.get("id"), digest)


def answered(output: Path, requests: list[Line], source: Path) -> int:
    """How many requests a file has answers to; a line that was not finished is cut off.

    Raises:
        UserError: a line answers another request than that of its place.
    """
    if not output.exists():
        return 0
    whole = count = 0
    with naming(output), output.open("rb") as file:
        for count, text in enumerate(file, start=1):
            if not text.endswith(b"\n"):
                count -= 1
                break
            if count > len(requests):
                raise UserError(
                    f"{output} has more answers than {source} requests, {len(requests)}; allowed: "
                    "another --output"
                )
            request = requests[count - 1]
            content = parse_json(text)
            if not isinstance(content, dict) or content.get("request") != request.digest:
                raise UserError(
                    f"{output} line {count} does not answer {source} line {request.number} with "
                    "this model and these options; allowed: another --output, or what was given "
                    "when it was begun"
                )
            if content.get("id") != request.id:
                raise UserError(
                    f"{output} line {count} has id={content.get('id')!r:.100}, {source} line "
                    f"{request.number} id={request.id!r:.100}; allowed: another --output, or the "
                    "ids that it was begun with"
                )
            whole += len(text)
    with file_errors(output):
        if whole < output.stat().st_size:
            os.truncate(output, whole)
    return count


@dataclass
class Answers:
    """What came of a file.

    Attributes:
        before: requests that had been answered already.
        requests, tokens: that were answered now, and tokens generated for them.
    """

    before: int
    requests: int = 0
    tokens: int = 0


def answer_file(
    generator: Generator,
    requests: list[Line],
    source: Path,
    output: Path,
    told: Callable[[Answers], None] = lambda _: None,
) -> Answers:
    """Answer requests into a file, and go on where an earlier start of the same has stopped.

    Args:
        told: called as answers come.

    Raises:
        UserError: a request could never fit (all such are named, before any work), the file
            answers others, another process writes it, or it cannot be written.
    """
    engine = generator.engine
    problems = [
        f"{source} line {each.number}: {problem}"
        for each in requests
        for problem in engine.problems(each.tokens.tolist(), each.params)
    ]
    if problems:
        raise ConfigError(problems)
    with claimed([output.with_name(f".{output.name}.claim")], "generate"):
        answers = Answers(answered(output, requests, source))
        with file_errors(output), output.open("ab") as file:
            for line, completions in _in_order(
                generator, requests[answers.before :], answers, told
            ):
                file.write(_record(line, completions))
                file.flush()
                answers.requests += 1
                told(answers)
            os.fsync(file.fileno())
    return answers


def _in_order(
    generator: Generator, requests: list[Line], answers: Answers, told: Callable[[Answers], None]
) -> Iterator[tuple[Line, list[Completion]]]:
    """Every request with its completions, in their order, of which a bounded number wait."""
    engine = generator.engine
    most_open = 4 * engine.limits.max_sequences
    completions: list[list[Completion]] = []
    numbers: dict[int, int] = {}
    submitted = written = 0
    while written < len(requests):
        while submitted < len(requests) and submitted - written < most_open:
            line = requests[submitted]
            numbers[engine.submit(line.tokens.tolist(), line.params)] = submitted
            completions.append([begun(line.params) for _ in range(line.params.n)])
            submitted += 1
        for event in engine.step():
            number = numbers[event.request]
            completion = completions[number][event.continuation]
            add_event(completion, event)
            answers.tokens += event.token is not None
            if event.end is not None:
                line = requests[number]
                completion.text = generator.text(
                    line.tokens.tolist(), completion.tokens, line.params.stop
                )
        told(answers)
        while written < submitted and all(each.end for each in completions[written]):
            yield requests[written], completions[written]
            completions[written] = []
            written += 1


def _record(line: Line, completions: list[Completion]) -> bytes:
    content: dict[str, Any] = {"request": line.digest}
    if line.id is not None:
        content["id"] = line.id
    content["prompt_tokens"] = len(line.tokens)
    if completions[0].prompt_logprobs is not None:
        content["prompt_logprobs"] = [_told(each) for each in completions[0].prompt_logprobs]
    content["completions"] = [
        {
            "text": each.text,
            "tokens": each.tokens,
            **({} if each.logprobs is None else {"logprobs": [_told(p) for p in each.logprobs]}),
            "end": each.end,
        }
        for each in completions
    ]
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def _told(logprob: TokenLogprob | None) -> Any:
    if logprob is None:
        return None
    if not logprob.top:
        return logprob.logprob
    return {"logprob": logprob.logprob, "top": [list(pair) for pair in logprob.top]}
