"""The server, over real sockets: what clients get, what they are refused, and how it ends."""

import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from megatron_hybrid.data.tokenizer import load_tokenizer
from megatron_hybrid.errors import UserError
from megatron_hybrid.generation import Completion, Generator, Limits, SamplingParams
from megatron_hybrid.generation.serving import Server, connection, loop, run, serve
from megatron_hybrid.testing import run_distributed
from tests.data.chat.templates import CHATML
from tests.generation.models import built, small_config

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DEFAULTS = SamplingParams(max_new_tokens=5)
SLOTS, QUEUE = 2, 4
LIMITS = Limits(max_sequences=SLOTS, max_tokens=100_000, prefill_tokens=16, page_tokens=64)
# None of these ends by itself within a test.
LONG = {"prompt": "1 2", "max_tokens": 40_000, "ignore_eos": True}
JSON_HEADERS = {"Content-Type": "application/json"}


def while_served(generator: Generator, client: Callable[[Server], Any], *, end: bool = True) -> Any:
    """On a rank: what a client returns, in a thread; then the server gets SIGTERM."""
    server = Server("127.0.0.1", 0)

    def visit() -> Any:
        try:
            for _ in range(6000):
                if server.api is not None and ask(server, path="/health")[0] == 200:
                    return client(server)
                time.sleep(0.01)
            raise TimeoutError("it never listened")
        finally:
            if end:
                os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        visited = pool.submit(visit)
        serve(generator, server, "small", DEFAULTS, max_queue=QUEUE)
        return visited.result()


def connected(server: Server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(*server.socket.getsockname()[:2], timeout=60)


def ask(
    server: Server, body: Any = None, path: str = COMPLETIONS, **headers: str
) -> tuple[int, Any, Any]:
    """Status, content and headers of an answer."""
    client = connected(server)
    try:
        if body is None:
            client.request("GET", path)
        else:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            client.request("POST", path, data, JSON_HEADERS | headers)
        response = client.getresponse()
        return response.status, json.loads(response.read()), response.headers
    except ConnectionRefusedError:
        return 0, None, None
    finally:
        client.close()


def begin(server: Server, body: Any, path: str = COMPLETIONS) -> http.client.HTTPConnection:
    client = connected(server)
    client.request("POST", path, json.dumps(body), JSON_HEADERS)
    return client


def events(response: http.client.HTTPResponse) -> list[Any]:
    """The server-sent events to the end, of which the last is "[DONE]" as it should be."""
    lines = response.read().decode().split("\n\n")
    assert lines.pop() == ""
    return [
        line.removeprefix("data: ") if line == "data: [DONE]" else json.loads(line[6:])
        for line in lines
    ]


def until(holds: Callable[[], bool]) -> None:
    for _ in range(6000):
        if holds():
            return
        time.sleep(0.01)
    raise TimeoutError


# -- what clients get ------------------------------------------------------------------------------

REQUESTS: list[tuple[dict[str, Any], list[list[int]], SamplingParams]] = [
    ({"prompt": "1 2 3"}, [[1, 2, 3]], DEFAULTS),
    ({"prompt": ["4 5", "6"], "max_tokens": 9, "temperature": 1.2, "seed": 3, "n": 2, "top_k": 40},
     [[4, 5], [6]], SamplingParams(max_new_tokens=9, temperature=1.2, seed=3, n=2, top_k=40)),
    ({"prompt": [7, 8], "max_tokens": 12, "stop": "1", "repetition_penalty": 1.3, "top_p": 0.9,
      "min_p": 0.01, "temperature": 1.0, "seed": 1234, "user": "x", "best_of": None,
      "frequency_penalty": 0.0},
     [[7, 8]], SamplingParams(max_new_tokens=12, stop=("1",), repetition_penalty=1.3, top_p=0.9,
                              min_p=0.01, temperature=1.0)),
]  # fmt: skip
SCORED = [list(range(3, 40)), [9, 2]]


def clients(server: Server, expected: list[list[list[Completion]]]) -> None:
    """Three at once, whole and streamed, get what the generator gives."""
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda each: ask(server, each[0]), REQUESTS))
        streams = list(pool.map(lambda each: streamed(server, each[0]), REQUESTS))
    for (status, content, _), stream, wholes, (body, prompts, _) in zip(
        answers, streams, expected, REQUESTS, strict=True
    ):
        flat = [completion for each in wholes for completion in each]
        assert status == 200 and content["object"] == "text_completion"
        assert [c["index"] for c in content["choices"]] == list(range(len(flat)))
        said = [(c["text"], c["finish_reason"]) for c in content["choices"]]
        ends = {"eod": "stop", "stop": "stop", "length": "length"}
        assert said == [(each.text, ends[each.end]) for each in flat], body
        assert stream[0] == said and stream[1] == content["usage"]
        assert content["usage"]["prompt_tokens"] == sum(map(len, prompts))
        tokens = sum(len(each.tokens) + (each.end == "eod") for each in flat)
        assert content["usage"]["completion_tokens"] == tokens


def draws(server: Server) -> None:
    """A prompt that is sent again gets another answer, unless both ask for the same seed."""
    body = {"prompt": "1 2 3", "max_tokens": 16, "temperature": 1.5, "ignore_eos": True}
    said = [
        ask(server, each)[1]["choices"][0]["text"]
        for each in (body, body, {**body, "seed": 7}, {**body, "seed": 7})
    ]
    assert said[0] != said[1] and said[2] == said[3]


def streamed(server: Server, body: dict[str, Any]) -> tuple[list[tuple[str, str]], Any]:
    client = begin(server, {**body, "stream": True, "stream_options": {"include_usage": True}})
    response = client.getresponse()
    assert response.headers["Content-Type"] == "text/event-stream"
    *chunks, last, done = events(response)
    client.close()
    assert done == "[DONE]" and last["choices"] == []
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    for chunk in chunks:
        [choice] = chunk["choices"]
        assert choice["index"] not in ends and chunk["usage"] is None
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["finish_reason"]
    return [(texts[i], ends[i]) for i in range(len(texts))], last["usage"]


def scored(server: Server, expected: list[list[Completion]]) -> None:
    """What evaluation harnesses ask for: the prompt's log-probabilities, then one token's."""
    body = {"prompt": SCORED, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    for most in (1, 0):
        status, content, _ = ask(server, {**body, "max_tokens": most})
        assert status == 200, content
        for choice, [completion], prompt in zip(content["choices"], expected, SCORED, strict=True):
            assert completion.prompt_logprobs and completion.logprobs and completion.end != "eod"
            told = [*completion.prompt_logprobs, *completion.logprobs[:most]]
            ids = [*prompt, *completion.tokens[:most]]
            logprobs = choice["logprobs"]
            assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
            assert logprobs["token_logprobs"][1:] == pytest.approx(
                [each.logprob for each in told[1:]], abs=1e-5
            )
            for token, top, each in zip(
                logprobs["tokens"][1:], logprobs["top_logprobs"][1:], told[1:], strict=True
            ):
                likeliest = max(top, key=top.get)
                assert (int(likeliest), top[likeliest]) == pytest.approx(each.top[0], abs=1e-5)
                assert token in top
            assert "".join(logprobs["tokens"]) == choice["text"] == " ".join(map(str, ids))
            ends = [*logprobs["text_offset"][1:], len(choice["text"])]
            for token, first, last in zip(
                logprobs["tokens"], logprobs["text_offset"], ends, strict=True
            ):
                assert choice["text"][first:last] == token
    eos = ask(server, {"prompt": "1", "logprobs": 0, "max_tokens": 3, "ignore_eos": True})[1]
    assert len(eos["choices"][0]["logprobs"]["tokens"]) == 3


# -- what they are refused -------------------------------------------------------------------------

WRONG: list[tuple[Any, str, str]] = [
    ({}, "prompt", "prompt must be a text"),
    ({"prompt": [[1], "2"]}, "prompt", "prompt must be a text"),
    ({"prompt": "x"}, "prompt", "ids separated by spaces"),
    ({"prompt": ""}, "prompt", "the prompt is empty"),
    ({"prompt": [[1], [75]]}, "prompt", "prompt 1: the prompt holds token 75"),
    ({"prompt": "1", "max_tokens": 200_000}, "prompt", "with max_tokens=200000 needs room"),
    ({"prompt": "1", "max_tokens": -1}, "max_tokens", "max_tokens=-1 must be a whole number"),
    ({"prompt": "1", "temperature": "hot"}, "temperature", "temperature=hot must be"),
    ({"prompt": "1", "temperature": -1, "top_p": 0}, "temperature", "top_p=0 must be above 0"),
    ({"prompt": "1", "stop": 3}, "stop", "stop=3 must be a text or a list"),
    ({"prompt": "1", "n": 129}, "n", "n=129 must be at most 128"),
    ({"prompt": "1", "n": 7}, "n", "7 answers; allowed: at most 6 at once"),
    ({"prompt": "1", "logprobs": 101}, "logprobs", "logprobs=101 must be at most 100"),
    ({"prompt": "1", "logprobs": True}, "logprobs", "logprobs=True must be"),
    ({"prompt": "1", "stream": 1}, "stream", "stream=1 must be true or false"),
    ({"prompt": "1", "stream_options": {}}, "stream_options", "needs stream=true"),
    ({"prompt": "1", "presence_penalty": 0.5}, "presence_penalty", "is not supported; allowed: 0"),
    ({"prompt": "1", "best_of": 2}, "best_of", "best_of=2 is not supported; allowed: 1"),
    ({"prompt": "1", "beams": 2}, "beams", "unknown field 'beams'; allowed: echo, "),
    ({"prompt": "1", "messages": []}, "messages", "unknown field 'messages'"),
    ([], "", "must be a JSON object"),
    (b'{"prompt": ', "", "is not JSON"),
    (b"[" * 100 + b"]" * 100, "", "nested more than"),
]


def refusals(server: Server) -> None:
    """By name, with OpenAI's error object; the server goes on."""
    for body, param, message in WRONG:
        status, content, _ = ask(server, body)
        assert status == 400, body
        assert content["error"]["type"] == "invalid_request_error"
        assert (content["error"]["param"] or "") == param and message in content["error"]["message"]
    assert ask(server, {"prompt": "1", "model": "other"})[1]["error"]["code"] == "model_not_found"
    assert ask(server, {"messages": [{"role": "user", "content": "1"}]}, CHAT)[1]["error"][
        "code"
    ] == "no_chat_template"  # fmt: skip
    assert ask(server, {}, "/v1/embeddings")[0] == 404
    assert ask(server, path=COMPLETIONS)[0] == 405
    assert ask(server, {}, **{"Content-Type": "text/plain"})[0] == 415
    assert ask(server, b"1" * (connection.MOST_BODY_BYTES + 1))[0] == 413
    assert ask(server, path="/v1/models")[1]["data"][0]["id"] == "small"
    assert ask(server, path="/v1/models/small")[0] == 200
    post = b"POST /v1/completions HTTP/1.1\r\n"
    for sent, status in (
        (b"nonsense\r\n\r\n", b""), (b"PUT / HTTP/1.1\r\n\r\n", b" 501 "),
        (post + b"Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n", b" 413 "),
        (post + b"Transfer-Encoding: chunked\r\n\r\n", b" 411 "),
        (post + b"Content-Length: x\r\n\r\n", b" 400 "),
        (b"GET / HTTP/1.1\r\n" + b"a: " + b"x" * 70_000 + b"\r\n\r\n", b" 431 "),
    ):  # fmt: skip
        with socket.create_connection(server.socket.getsockname()[:2], timeout=60) as raw:
            raw.sendall(sent)
            raw.shutdown(socket.SHUT_WR)
            answer = raw.makefile("rb").read()
        assert status in answer.partition(b"\r\n")[0] and b'{"error": ' in answer, (sent, answer)


def hang_ups(server: Server) -> None:
    """Who hangs up frees the slot or the place in the queue; beyond the queue there is 429."""
    assert server.api is not None
    under_way = server.api.loop
    streaming = begin(server, {**LONG, "stream": True})
    first = streaming.getresponse()
    assert first.readline().startswith(b"data: ")
    others = [begin(server, LONG)]  # the second slot
    until(lambda: under_way._open == 2)
    others += [begin(server, LONG) for _ in range(QUEUE)]
    until(lambda: under_way._open == SLOTS + QUEUE)
    status, content, headers = ask(server, {"prompt": "1"})
    assert (status, headers["Retry-After"]) == (429, "1") and "queue" in content["error"]["code"]
    others.pop().close()
    until(lambda: under_way._open == SLOTS + QUEUE - 1)
    waiting = begin(server, {"prompt": "1 2 3"})
    first.close()
    streaming.close()
    for each in others:
        each.close()
    answer = waiting.getresponse()
    assert answer.status == 200 and json.loads(answer.read())["choices"][0]["text"]
    waiting.close()
    until(lambda: not under_way.open)


def one_server() -> None:
    """On a rank: all of these, then the end."""
    with built(small_config("two layers"), LIMITS) as generator:
        expected = [generator.generate(prompts, params) for _, prompts, params in REQUESTS]
        score = SamplingParams(max_new_tokens=1, logprobs=1, prompt_logprobs=True)
        scores = generator.generate(SCORED, score)

        def client(server: Server) -> None:
            with pytest.raises(UserError, match=r"--serve \d+ cannot listen at .* in use"):
                Server(*server.socket.getsockname()[:2])
            clients(server, expected)
            draws(server)
            scored(server, scores)
            refusals(server)
            hang_ups(server)

        while_served(generator, client)
        assert generator.engine.states.slots == [None] * SLOTS
        endings(generator)


def endings(generator: Generator) -> None:
    """SIGTERM: what is under way ends as if nothing was, within a bound; nothing else begins."""

    def ended_by(body: dict[str, Any]) -> tuple[list[Any], int]:
        def client(server: Server) -> tuple[list[Any], int]:
            held = connected(server)
            held.connect()
            one = begin(server, {**body, "stream": True}).getresponse()
            os.kill(os.getpid(), signal.SIGTERM)
            assert server.api is not None
            until(lambda: server.api is not None and server.api.loop.closed)
            held.request("POST", COMPLETIONS, '{"prompt": "1"}', JSON_HEADERS)
            return events(one), held.getresponse().status

        found: tuple[list[Any], int] = while_served(generator, client, end=False)
        return found

    whole, refused = ended_by({"prompt": "1", "max_tokens": 200, "ignore_eos": True})
    assert len(whole) == 201 and whole[-1] == "[DONE]" and refused == 503
    run.GRACE_S = 0.0
    cut, _ = ended_by(LONG)
    assert "the server ended before" in cut[-1]["error"]["message"]


def test_what_clients_get_and_are_refused() -> None:
    """Tokens, streams and log-probabilities of the generator; errors by name; slots that are freed;
    an orderly end."""
    run_distributed(one_server, 1)


# -- chat ------------------------------------------------------------------------------------------


def chat(folder: Path) -> None:
    """On a rank: messages are rendered by the tokenizer's template, and the answer is the text."""
    words = {str(i): i for i in range(68)} | {"?": 68, "user": 69, "assistant": 70}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["<|im_start|>", "<|im_end|>", "</s>"])
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "chat_template": CHATML})
    )
    asked = SamplingParams(max_new_tokens=6, logprobs=2, ignore_eod=True)
    prompt = [71, 69, 5, 6, 72, 71, 70]
    with built(small_config("two layers"), LIMITS) as null:
        generator = Generator.of_model(
            null.config, null.chunks, load_tokenizer(folder), limits=LIMITS
        )
        [[expected]] = generator.generate([prompt], asked)

        def client(server: Server) -> None:
            message = {"role": "user", "content": "5 6"}
            body = {"messages": [message], "max_completion_tokens": 6, "logprobs": True,
                    "top_logprobs": 2, "ignore_eos": True, "tools": []}  # fmt: skip
            status, content, _ = ask(server, body, CHAT)
            assert status == 200, content
            [choice] = content["choices"]
            assert choice["message"] == {"role": "assistant", "content": expected.text}
            assert choice["finish_reason"] == "length" and content["usage"]["prompt_tokens"] == 7
            assert expected.logprobs
            for each, told in zip(choice["logprobs"]["content"], expected.logprobs, strict=True):
                assert each["logprob"] == pytest.approx(told.logprob, abs=1e-5)
                assert [top["logprob"] for top in each["top_logprobs"]] == pytest.approx(
                    [value for _, value in told.top], abs=1e-5
                )
                assert bytes(each["bytes"]).decode() == each["token"]
            parts = [{"type": "text", "text": "5"}, {"type": "text", "text": "6"}]
            body["messages"] = [{"role": "user", "content": parts, "tool_calls": None}]
            first, *chunks, done = events(
                begin(server, {**body, "stream": True}, CHAT).getresponse()
            )
            assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
            assert "".join(deltas) == expected.text and done == "[DONE]"
            for wrong, named in (
                ([], "at least one"), ([{"role": "tool", "content": "1"}], ".role='tool'"),
                ([message, {"role": "user"}], "messages[1].content must be a text"),
                ([{**message, "tool_calls": [1]}], "messages[0].tool_calls is not supported"),
                ([{"role": "user", "content": "<|im_end|>"}], "messages[0] holds '<|im_end|>'"),
                ([{"role": "user", "content": "\ud800"}], "half a character"),
            ):  # fmt: skip
                status, content, _ = ask(server, {**body, "messages": wrong}, CHAT)
                assert status == 400 and content["error"]["param"] == "messages"
                assert named in content["error"]["message"]
            wrong_tools = ask(server, {**body, "tools": [{}]}, CHAT)[1]["error"]
            assert wrong_tools["param"] == "tools"
            unread = ask(server, {**body, "chat_template_kwargs": {"thinks": False}}, CHAT)[1]
            assert unread["error"]["param"] == "chat_template_kwargs"

        while_served(generator, client)


def test_chat_by_the_tokenizers_template(tmp_path: Path) -> None:
    """The prompt is what the template renders, special tokens as ids; whole and streamed."""
    run_distributed(chat, 1, tmp_path)


# -- several ranks ---------------------------------------------------------------------------------


def on_two_ranks() -> str | None:
    """On a rank: the first serves, the other follows, also while nobody asks; a launcher passes
    SIGTERM to both."""
    loop.KEEP_IN_STEP_S = 0.0
    config = small_config("two layers", "parallel.tensor_model_parallel_size=2")
    pids: list[int] = [0, 0]
    torch.distributed.all_gather_object(pids, os.getpid())
    with built(config, LIMITS) as generator:
        if not generator.engine.leads:
            serve(generator, None, "small", DEFAULTS, max_queue=QUEUE)
            return None

        def client(server: Server) -> Any:
            os.kill(pids[1], signal.SIGTERM)
            return ask(server, {"prompt": "1 2 3"})[1]

        answer = while_served(generator, client)
        generator.close()
        return str(answer["choices"][0]["text"])


def test_ranks_serve_together() -> None:
    """The first answers with the others, and lets them go; the signal alone does not."""
    text, nothing = run_distributed(on_two_ranks, 2)
    assert text and nothing is None
