"""`Generator`: prompts in, completions out, with a checkpoint's model or one that is trained."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.checkpoint.carried import carried_ends
from megatron_hybrid.checkpoint.integrity import checkpoint_digest
from megatron_hybrid.config import RunConfig
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.errors import UserError
from megatron_hybrid.generation.checkpoint import (
    loaded_model,
    read_checkpoint,
    refuse_unable,
)
from megatron_hybrid.generation.params import Limits, SamplingParams
from megatron_hybrid.generation.request import Completion, Event, TokenLogprob
from megatron_hybrid.generation.text import TextStream
from megatron_hybrid.training.distributed import launched_world_size

if TYPE_CHECKING:
    from megatron_hybrid.generation.engine import Engine

Prompt = str | Sequence[int]


class Generator:
    """Answers prompts with a model.

        with Generator(Path("runs/web")) as generator:
            [[completion]] = generator.generate(["Classes"], SamplingParams(max_new_tokens=16))

    Args:
        checkpoint: a run's folder, its checkpoints', or one of them.
        layout: of the ranks that a launcher has started, as words such as
            `parallel.tensor_model_parallel_size=2`. The first has prompts answered; the others
            call `follow`.
        limits: sizes of the states.
        parse_special_tokens: the text of a special token in a prompt becomes its id.

    Attributes:
        config: of the model.
        chunks: the model, this rank's pipeline chunks.
        vocab_size: tokens that may be drawn.
        limits: sizes of the states, which are made with the first request.

    Raises:
        UserError: the checkpoint cannot be used.
    """

    _folder: Path | None = None  # of a checkpoint
    _ends: frozenset[int] = frozenset()  # beside the tokenizer's

    def __init__(
        self,
        checkpoint: Path,
        *,
        layout: Sequence[str] = (),
        limits: Limits | None = None,
        parse_special_tokens: bool = False,
    ) -> None:
        ranks = launched_world_size()
        read = read_checkpoint(
            checkpoint, layout, world_size=ranks, parse_special_tokens=parse_special_tokens
        )
        self._open(*read, limits, alone=ranks == 1)

    @classmethod
    def of_checkpoint(
        cls,
        config: RunConfig,
        folder: Path,
        tokenizer: Tokenizer,
        *,
        limits: Limits | None = None,
        alone: bool = True,
    ) -> Self:
        """Of a checkpoint that was read, as `read_checkpoint` does.

        Args:
            config: of a layout in which ranks generate.
            folder: the checkpoint itself, `.../iter_0000100`, saved by any layout.
            alone: this process is the only rank, whatever the environment says.

        Raises:
            UserError: it cannot be loaded, is of another model, or has fewer ids than the
                tokenizer.
        """
        generator = cls.__new__(cls)
        generator._open(config, folder, tokenizer, limits, alone=alone)
        return generator

    def _open(
        self,
        config: RunConfig,
        folder: Path,
        tokenizer: Tokenizer,
        limits: Limits | None,
        *,
        alone: bool,
    ) -> None:
        refuse_unable(config, folder)
        resources = ExitStack()
        opened = loaded_model(config, folder, tokenizer, alone=alone)
        config, chunks = resources.enter_context(opened)
        self._set(config, chunks, tokenizer, limits, resources)
        self._folder, self._ends = folder, carried_ends(folder)

    @classmethod
    def of_model(
        cls,
        config: RunConfig,
        chunks: Sequence[torch.nn.Module],
        tokenizer: Tokenizer,
        *,
        limits: Limits | None = None,
        ends: frozenset[int] = frozenset(),
    ) -> Self:
        """Of a model in memory, as one that is being trained: its weights are shared.

        They are taken up again by each `generate`. Process groups stay the caller's.

        Args:
            config: of the run.
            chunks: this rank's, as built or as wrapped for training.
            ends: tokens that end a text, beside the tokenizer's.

        Raises:
            UserError: it cannot generate, or has fewer ids than the tokenizer.
        """
        refuse_unable(config, "the model")
        config = config.with_vocab_size(tokenizer.vocab_size)
        generator = cls.__new__(cls)
        generator._set(config, chunks, tokenizer, limits, ExitStack())
        generator._ends = ends
        return generator

    def _set(
        self,
        config: RunConfig,
        chunks: Sequence[torch.nn.Module],
        tokenizer: Tokenizer,
        limits: Limits | None,
        resources: ExitStack,
    ) -> None:
        self.config, self.chunks, self.tokenizer = config, list(chunks), tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.limits = limits or Limits()
        self._resources = resources
        self._engine: Engine | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other ranks go, and give back the process groups where they were made for it."""
        if self._engine is not None and self._engine.leads:
            self._engine.end()
        self._engine = None
        self._resources.close()

    @property
    def engine(self) -> "Engine":
        """What takes requests at any time; made, with its states, when it is first asked for."""
        if self._engine is None:
            from megatron_hybrid.generation.decoder import Decoder
            from megatron_hybrid.generation.engine import Engine

            self._engine = Engine(
                Decoder(self.chunks, self.config.model),
                self.limits,
                vocab_size=self.vocab_size,
                ends={self.tokenizer.eod, *self._ends},
                stopper=lambda prompt, stop: TextStream(self.tokenizer, prompt, stop),
            )
        return self._engine

    @property
    def name(self) -> str:
        """Which model it is, wherever its checkpoint lies."""
        return "a model in memory" if self._folder is None else checkpoint_digest(self._folder)

    def follow(self, each_step: Callable[[], None] | None = None) -> None:
        """On every rank but the first: take part until that one closes its generator."""
        self.engine.follow(each_step)

    def encode(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt; those that are given stay as they are."""
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        told: Callable[[], None] | None = None,
    ) -> list[list[Completion]]:
        """All completions, in the order of the prompts: `n` for each.

        Args:
            params: for all, or one for each.
            told: called whenever a completion is done.

        Raises:
            UserError: a prompt is empty or longer than the states hold; before any work.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        requests: dict[int, int] = {}
        completions = [[begun(p) for _ in range(p.n)] for p in each]
        for index, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            try:
                requests[self.engine.submit(self.encode(prompt), own)] = index
            except UserError as error:
                self._cancel(requests)
                raise UserError(
                    f"prompt {index}: {error}" if len(prompts) > 1 else str(error)
                ) from None
        while self.engine.busy:
            for event in self.engine.step():
                index = requests[event.request]
                completion = completions[index][event.continuation]
                add_event(completion, event)
                if event.end is not None:
                    prompt = self.encode(prompts[index])
                    completion.text = self.text(prompt, completion.tokens, each[index].stop)
                    if told is not None:
                        told()
        return completions

    def score(
        self,
        requests: Iterable[tuple[Sequence[int], Sequence[Sequence[int]]]],
        *,
        top: int = 0,
        told: Callable[[], None] | None = None,
    ) -> list[list[Sequence[TokenLogprob]]]:
        """Log-probabilities of the tokens of continuations that are there already.

        Each prompt is computed once for all of its continuations.

        Args:
            requests: tokens of a prompt, and of its continuations.
            top: how many of the likeliest tokens are told at each place.
            told: called whenever a continuation is done.

        Raises:
            UserError: a prompt or a continuation is empty, or longer than the states hold.
        """
        found: list[list[Sequence[TokenLogprob]]] = []
        requests_of: dict[int, int] = {}
        for prompt, given in requests:
            try:
                number = self.engine.score(list(prompt), [list(each) for each in given], top)
            except UserError as error:
                self._cancel(requests_of)
                raise UserError(f"request {len(found)}: {error}") from None
            requests_of[number] = len(found)
            found.append([()] * len(given))
        while self.engine.busy:
            for event in self.engine.step():
                told_of = event.prompt_logprobs or ()
                found[requests_of[event.request]][event.continuation] = [e for e in told_of if e]
                if told is not None:
                    told()
        return found

    def _cancel(self, requests: Iterable[int]) -> None:
        for request in requests:
            self.engine.cancel(request)
        self.engine.step()

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        """The text of a continuation, piece by piece as it is generated."""
        tokens = self.encode(prompt)
        text = TextStream(self.tokenizer, tokens, params.stop)
        for event in self.events(tokens, params):
            if event.token is not None and event.end != "eod" and (piece := text.add(event.token)):
                yield piece
        if piece := text.finish():
            yield piece

    def events(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Event]:
        """What comes of one request; giving up the iterator ends it."""
        request = self.engine.submit(list(prompt), params)
        try:
            while self.engine.busy:
                yield from self.engine.step()
        finally:
            if self.engine.busy:
                self.engine.cancel(request)
                self.engine.step()

    def text(self, prompt: Sequence[int], tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
        """The text of a continuation, up to a stop text."""
        stream = TextStream(self.tokenizer, prompt, stop)
        for token in tokens:
            stream.add(token)
        stream.finish()
        return stream.text

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """All at once by the model's own forward pass: `[b, s]` int64 -> `[b, s, V]` fp32."""
        (model,) = self.chunks
        metas = self.engine.states.num_meta_tokens
        row = F.pad(tokens, (metas, 0))  # has room for them
        places = torch.arange(row.shape[1], device=row.device).expand_as(row)
        logits: Tensor = model(row, places, None)
        return logits[:, metas:].float()


def begun(params: SamplingParams) -> Completion:
    """A completion before its first token."""
    return Completion(logprobs=None if params.logprobs is None else [])


def add_event(completion: Completion, event: Event) -> None:
    """Bring a completion forward by an event of it; its text is left to who wants it."""
    if event.prompt_logprobs is not None:
        completion.prompt_logprobs = event.prompt_logprobs
    if event.end is not None:
        completion.end = event.end
    if event.token is None or event.end == "eod":
        return
    completion.tokens.append(event.token)
    if event.logprob is not None:
        assert completion.logprobs is not None
        completion.logprobs.append(event.logprob)
