"""`megatron-hybrid generate`: text from a model, for a prompt, a file of them, or clients."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from launchers.environment import MOST_PORT, whole_number
from launchers.local import launch
from megatron_hybrid.bounds import MOST_COUNT, MOST_NEW_TOKENS, MOST_PROCESSES
from megatron_hybrid.commands.app import only_with
from megatron_hybrid.commands.options import ParseSpecialTokens, note_around_texts
from megatron_hybrid.platform.threads import spin_before_sleeping
from megatron_hybrid.platform.warm import load_for_forks

if TYPE_CHECKING:
    from megatron_hybrid.generation import Generator, SamplingParams


@only_with("prompts", "n", "logprobs")
@only_with("serve", "host", "max_queue")
def generate(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(help="a run's folder, its checkpoints', or one of them")
    ],
    prompt: Annotated[str | None, typer.Option(help="text to continue")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="file of JSON lines, with 'prompt' or 'tokens', and any of the options below by "
            "its name in Python, such as 'max_new_tokens'"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="with --prompts: answers, a JSON line each; goes on where it ended"),
    ] = None,
    serve: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_PORT,
            help="answer clients of OpenAI's interface at this port; what a "
            "request does not say is as the options below",
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="with --serve: the address to listen at; others than this let "
            "anybody in who reaches it"
        ),
    ] = "127.0.0.1",
    max_queue: Annotated[
        int, typer.Option(min=0, max=MOST_COUNT, help="with --serve: answers that may wait")
    ] = 256,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_NEW_TOKENS, help="tokens to add at most")
    ] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token")] = 0.0,
    top_k: Annotated[int, typer.Option(help="only among the k likeliest; 0: all")] = 0,
    top_p: Annotated[float, typer.Option(help="only among the likeliest that sum to p")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="only among those p times as probable as the likeliest")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="against tokens that were there before; 1: none")
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(help="of the draws; with --serve of the first request's, others count on")
    ] = 1234,
    stop: Annotated[
        list[str] | None, typer.Option(help="a text that ends the continuation; may be repeated")
    ] = None,
    n: Annotated[int, typer.Option("--n", help="with --prompts: continuations of each")] = 1,
    logprobs: Annotated[
        int | None, typer.Option(help="with --prompts: log-probabilities, of so many likeliest too")
    ] = None,
    parse_special_tokens: ParseSpecialTokens = False,
    max_sequences: Annotated[
        int, typer.Option(min=1, max=MOST_COUNT, help="not with --prompt: under way at once")
    ] = 16,
    max_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_COUNT, help="not with --prompt: of all under way")
    ] = 65536,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_PROCESSES, help="start this many ranks on this machine"),
    ] = None,
) -> None:
    """Continue a text, a file of them, or those of clients, with a trained model.

    With ranks, `parallel.tensor_model_parallel_size=2` and its like say how they divide the model.
    """
    _check_usage(prompt, prompts, output, serve, context)
    from megatron_hybrid.checkpoint.files import find_checkpoint

    find_checkpoint(checkpoint)  # what is not there is said before torch is loaded
    spin_before_sleeping()
    from megatron_hybrid.generation import SamplingParams
    from megatron_hybrid.training.distributed import is_rank_zero

    params = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, repetition_penalty=repetition_penalty, seed=seed, stop=tuple(stop or ()),
        n=n, logprobs=logprobs,
    )  # fmt: skip
    server = None
    if serve is not None and is_rank_zero():
        from megatron_hybrid.generation.serving import Server

        server = Server(host, serve)
    if nproc is not None and nproc > 1:
        if server is not None:  # the place is there, and the first rank will take it
            server.close()
        _launch(context, checkpoint, nproc)
    from megatron_hybrid.generation import Generator, Limits

    limits = Limits(max_sequences=max_sequences, max_tokens=max_tokens)
    with Generator(
        checkpoint, layout=context.args, limits=limits, parse_special_tokens=parse_special_tokens
    ) as generator:
        if prompt is not None:
            # Before the engine is made, alike on every rank: what one prompt takes.
            tokens = generator.encode(prompt)
            generator.limits = Limits(max_sequences=1, max_tokens=len(tokens) + max_new_tokens)
        elif is_rank_zero():
            _note_unread(generator)
        if is_rank_zero() and not parse_special_tokens:  # else a prompt may begin as it should
            note_around_texts(generator.tokenizer)
        if serve is not None:
            from megatron_hybrid.generation.serving import serve as run

            run(
                generator, server, checkpoint.resolve().name, params, max_queue=max_queue,
                special_in_texts=parse_special_tokens,
            )  # fmt: skip
        elif not generator.engine.leads:
            generator.follow()
        elif prompt is not None:
            if params.unread:
                print(f"note: {params.unread}", file=sys.stderr)
            _stream(generator, prompt, tokens, params)
        elif prompts is not None and output is not None:
            _answer(generator, prompts, output, params)


def _note_unread(generator: "Generator") -> None:
    """Say that --max-tokens limits nothing, where that is so."""
    from megatron_hybrid.config.pattern import ATTENTION, has_kind

    most, pattern = generator.limits.max_tokens, generator.config.model.hybrid_layer_pattern
    if most != type(generator.limits).max_tokens and not has_kind(pattern, ATTENTION):
        print(
            f"note: max_tokens={most} has no effect: {pattern} has neither '*' nor 'H' "
            "layers, which keep keys and values of tokens", file=sys.stderr,
        )  # fmt: skip


def _check_usage(
    prompt: str | None,
    prompts: Path | None,
    output: Path | None,
    serve: int | None,
    context: typer.Context,
) -> None:
    refuse_options(context)
    if sum(each is not None for each in (prompt, prompts, serve)) != 1:
        raise typer.BadParameter("give one of them", param_hint="--prompt / --prompts / --serve")
    if (prompts is None) != (output is None):
        raise typer.BadParameter("one needs the other", param_hint="--prompts / --output")
    for name, option in (("max_sequences", "--max-sequences"), ("max_tokens", "--max-tokens")):
        source = context.get_parameter_source(name)
        if prompt is not None and source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter("only with --prompts or --serve", param_hint=option)
    if not context.params["host"]:
        raise typer.BadParameter("it must not be empty", param_hint="--host")


def refuse_options(context: typer.Context) -> None:
    """Refuse words that look like options and are none, not Megatron-LM's either."""
    from megatron_hybrid.config.flags import flags

    known = flags()
    for word in context.args:
        if word.startswith("-") and word.partition("=")[0] not in known:
            raise typer.BadParameter(f"no such option: {word}")


def check_launcher(nproc: int | None) -> None:
    """Refuse to start ranks where a launcher has."""
    if nproc is not None and nproc > 1 and (launched := os.environ.get("WORLD_SIZE")):
        whole_number(os.environ, "WORLD_SIZE", least=1)
        raise typer.BadParameter(
            f"a launcher has started this rank already (WORLD_SIZE={launched})",
            param_hint="--nproc",
        )


def _launch(context: typer.Context, checkpoint: Path, nproc: int) -> None:
    """Start the ranks and exit as they do, after what can be refused without them."""
    check_launcher(nproc)
    from megatron_hybrid.generation.checkpoint import read_checkpoint

    read_checkpoint(checkpoint, context.args, world_size=nproc)
    start_ranks(nproc)


def start_ranks(nproc: int) -> NoReturn:
    """Run this command line on so many ranks, and exit as they do."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word != "--nproc" and not word.startswith("--nproc="):
            words.append(word)
        skip = word == "--nproc"
    raise typer.Exit(launch(["-m", "megatron_hybrid.cli", *words], nproc, forks=load_for_forks()))


def _stream(
    generator: "Generator", prompt: str, tokens: list[int], params: "SamplingParams"
) -> None:
    pieces = generator.stream(tokens, params)
    # The prompt not before the model is loaded: an error would follow half a line.
    first = next(pieces, "")
    print(prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _answer(generator: "Generator", prompts: Path, output: Path, params: "SamplingParams") -> None:
    """Answer a file, with a bar on stderr that tells requests, tokens a second and time left."""
    import time

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from megatron_hybrid.generation.batch_file import Answers, answer_file, read_requests

    requests = read_requests(prompts, params, generator.encode, generator.name)
    if unread := [each for each in requests if each.params.unread]:
        print(
            f"note: {len(unread)} of {len(requests)} requests, the first in {prompts} line "
            f"{unread[0].number}: {unread[0].params.unread}", file=sys.stderr,
        )  # fmt: skip
    start = time.monotonic()

    def speed(answers: Answers) -> str:
        return f"{answers.tokens / max(time.monotonic() - start, 1e-9):,.0f} tokens/s"

    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), console=Console(stderr=True),
    ) as bar:  # fmt: skip
        task = bar.add_task("requests", total=len(requests), speed="")

        def told(answers: Answers) -> None:
            bar.update(task, completed=answers.before + answers.requests, speed=speed(answers))

        answers = answer_file(generator, requests, prompts, output, told)
    before = f", {answers.before} were there already" if answers.before else ""
    print(
        f"{output}: {answers.requests} requests answered{before}; {answers.tokens} tokens, "
        f"{speed(answers)}"
    )
