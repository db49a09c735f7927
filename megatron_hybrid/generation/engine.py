"""The engine: requests at any time, tokens of all of them step by step.

Each step computes a token more of every sequence that is past its prompt, and a bounded part of the
prompts of those that are not; a slot that is given back is taken by the next request in the same
step. On several ranks every one runs the same engine: rank 0 takes requests and tells the others
of them at the start of a step, and the tokens are those that a rank of the last stage drew.
"""

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_hybrid.errors import UserError
from megatron_hybrid.generation.batch import Batches
from megatron_hybrid.generation.decoder import Decoder
from megatron_hybrid.generation.drawing import Drawer, Drawn, Wanted, wanted
from megatron_hybrid.generation.params import Limits, SamplingParams
from megatron_hybrid.generation.ranks import Ranks
from megatron_hybrid.generation.request import Event, Sequence, TokenLogprob


@dataclass
class _Submitted:
    request: int
    prompt: list[int]
    params: SamplingParams
    given: list[list[int]] = field(default_factory=list)  # continuations that are only looked at


@dataclass
class _Orders:
    """What rank 0 tells the others at the start of a step."""

    submitted: list[_Submitted] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    refresh: bool = False
    end: bool = False

    def __bool__(self) -> bool:
        return bool(self.submitted or self.cancelled or self.refresh or self.end)


class Engine:
    """Answers requests with a model.

    Args:
        decoder: the model of this rank.
        vocab_size: tokens that may be drawn; rows beyond it are padding.
        ends: tokens that end a text.
        stopper: makes, of a prompt and its stop texts, what knows when one of them has come: its
            `add` takes each token, its `stopped` tells. None: stop texts are refused.

    Attributes:
        limits: what it holds at once, as given.
    """

    def __init__(
        self,
        decoder: Decoder,
        limits: Limits,
        *,
        vocab_size: int,
        ends: Collection[int],
        stopper: Callable[[list[int], tuple[str, ...]], Any] | None = None,
    ) -> None:
        self.decoder, self.limits = decoder, limits
        self.vocab_size, self._stopper = vocab_size, stopper
        self._ends = frozenset(ends)
        self.states = decoder.make_states(limits)
        self._ranks = Ranks(decoder)
        self._batches = Batches(self.states, decoder.device, decoder.kept_dtype)
        self._orders = _Orders(refresh=True)
        self._next_request = 0
        self._waiting: deque[Sequence] = deque()  # the first continuation of each
        self._filling: list[Sequence] = []  # their prompts are under way
        self._decoding: list[Sequence] = []  # in slots 0 to B - 1
        self._drawer = Drawer(vocab_size, decoder.device)
        self._events: list[Event] = []
        metas = self.states.num_meta_tokens
        # Before every text; its states are computed once, and each text begins with a copy.
        self._metas: Sequence | None = None
        if metas:
            nothing = SamplingParams(max_new_tokens=0)
            self._metas = Sequence(-1, 0, nothing, list(range(metas)), metas, metas)
            pages = self.states.pages_needed(metas)
            self.states.admit(self._metas, pages, slot=limits.max_sequences)

    # -- what others call --------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._orders.submitted or self._orders.cancelled or self._under_way)

    @property
    def leads(self) -> bool:
        """Whether this rank takes the requests; the others `follow`."""
        return self._ranks.first

    @property
    def _under_way(self) -> bool:
        return bool(self._waiting or self._filling or self._decoding)

    @property
    def waiting(self) -> int:
        """Requests, or parts of their continuations, that have no slot yet."""
        return len(self._waiting) + len(self._orders.submitted)

    def submit(self, prompt: list[int], params: SamplingParams) -> int:
        """Take a request in; it begins with the next step that has room for it.

        Returns:
            Its number, which its events bear.

        Raises:
            UserError: the states could never hold it, or it asks for what cannot be; all at once.
        """
        return self._submit(prompt, params, [])

    def score(self, prompt: list[int], given: list[list[int]], top: int = 0) -> int:
        """Take a request in that only looks at continuations which are there already.

        The prompt is computed once for all of them. Each has one event, whose `prompt_logprobs` are
        those of its own tokens.

        Args:
            given: continuations, of at least one token each.
            top: how many of the likeliest tokens are told at each place.

        Returns:
            Its number, which its events bear.

        Raises:
            UserError: as `submit`.
        """
        looking = SamplingParams(max_new_tokens=0, prompt_logprobs=True, logprobs=top)
        return self._submit(prompt, looking, [list(each) for each in given])

    def _submit(self, prompt: list[int], params: SamplingParams, given: list[list[int]]) -> int:
        longest = max(given, key=len, default=[])
        problems = self.problems([*prompt, *longest] if prompt else [], params)
        if not all(given):
            problems.append("a continuation is empty: give at least one token")
        strange = [t for each in given for t in each if not 0 <= t < self.vocab_size]
        if strange:
            problems.append(
                f"a continuation holds token {strange[0]}; allowed: 0 to {self.vocab_size - 1}"
            )
        if problems:
            raise UserError("\n".join(problems))
        request = self._next_request
        self._next_request += 1
        self._orders.submitted.append(_Submitted(request, list(prompt), params, given))
        return request

    def cancel(self, request: int) -> None:
        """End a request; its slots are free from the next step on, which tells of its end."""
        self._orders.cancelled.append(request)

    def refresh(self) -> None:
        """Take the weights up again at the next step, as after steps of training.

        It does so by itself before the first request after a pause; weights must not change while
        requests are under way.
        """
        self._orders.refresh = True

    def step(self) -> list[Event]:
        """One step; on other ranks than the first as part of `follow`.

        Returns:
            What has come of it: at most a token for each continuation.
        """
        if not self._under_way:
            self._orders.refresh = True
        orders = self._ranks.told(self._orders)
        self._orders = _Orders()
        self._take(orders)
        if not orders.end:
            self._admit()
            self._compute()
        events, self._events = self._events, []
        return events

    def follow(self, each_step: Callable[[], None] | None = None) -> None:
        """On ranks other than the first: take part in its steps until it ends them."""
        while not self._ranks.ended:
            self.step()
            if each_step is not None:
                each_step()

    def end(self) -> None:
        """On the first rank: let the others go."""
        if self._ranks.many and not self._ranks.ended:
            self._orders = _Orders(end=True)
            self.step()

    def problems(self, prompt: list[int], params: SamplingParams) -> list[str]:
        """Why `submit` would refuse a request, a sentence each."""
        limits, tokens = self.limits, len(prompt) + params.max_new_tokens
        problems = []
        if not prompt:
            problems.append("the prompt is empty: give at least one character")
        strange = [t for t in prompt if not 0 <= t < self.vocab_size]
        if strange:
            problems.append(
                f"the prompt holds token {strange[0]}; allowed: 0 to {self.vocab_size - 1}"
            )
        pages = self.states.pages_needed(self.states.num_meta_tokens + tokens)
        if pages > self.states.page_limit:
            problems.append(
                f"a prompt of {len(prompt)} tokens with max_new_tokens={params.max_new_tokens} "
                f"needs room for {tokens} tokens; max_tokens={limits.max_tokens} is what the "
                "engine was made with"
            )
        if params.stop and self._stopper is None:
            problems.append(f"stop={params.stop!r} needs a tokenizer")
        return problems

    # -- orders ------------------------------------------------------------------------------------

    def _take(self, orders: _Orders) -> None:
        if orders.refresh:
            self.decoder.refresh()
            self._compute_metas()
        for each in orders.submitted:
            self._enqueue(each)
        for request in orders.cancelled:
            for sequence in self._of(request):
                sequence.cancelled = True

    def _enqueue(self, each: _Submitted) -> None:
        """Continuations that share a prompt's states, in groups that have room at once."""
        tails = each.given or [[]] * each.params.n
        longest = len(each.prompt) + max(map(len, tails)) + each.params.max_new_tokens
        pages = self.states.pages_needed(self.states.num_meta_tokens + longest)
        group = min(len(tails), self.limits.max_sequences)
        if pages:
            group = min(group, self.states.page_limit // pages)
        sequences = [
            Sequence.of(
                each.request, i, each.params, each.prompt, tail, self.states.num_meta_tokens
            )
            for i, tail in enumerate(tails)
        ]
        for sequence in sequences:
            if each.params.stop:
                assert self._stopper is not None
                sequence.stopper = self._stopper(each.prompt, each.params.stop)
        for first in range(0, len(sequences), group):
            head, *siblings = sequences[first : first + group]
            head.siblings = siblings
            self._waiting.append(head)

    def _of(self, request: int) -> list[Sequence]:
        under_way = [*self._waiting, *self._filling, *self._decoding]
        return [
            each for head in under_way if head.request == request for each in (head, *head.siblings)
        ]

    # -- a step ------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let go of what nobody wants, and give free slots to those that came first."""
        for queue in (self._waiting, self._filling, self._decoding):
            for sequence in [each for each in queue if each.cancelled]:
                if queue is not self._decoding:
                    queue.remove(sequence)
                for each in (sequence, *sequence.siblings):
                    self._leave(each)
                    self._events.append(
                        Event(each.request, each.continuation, None, end="cancelled")
                    )
        while self._waiting:
            head = self._waiting[0]
            family = (head, *head.siblings)
            longest = max(each.prompt_tokens for each in family) + head.params.max_new_tokens
            pages = self.states.pages_needed(self.states.num_meta_tokens + longest)
            if not self.states.room(len(family), pages):
                return
            self._waiting.popleft()
            for sequence in family:
                self.states.admit(sequence, pages)
            if self._metas is not None:
                self.states.fork(self._metas, head)
            self._filling.append(head)

    def _chunks(self) -> list[tuple[Sequence, int]]:
        """Whose prompts go on in this step, and by how many tokens."""
        left, chunks = self.limits.prefill_tokens, []
        for sequence in self._filling:
            length = min(sequence.goal - sequence.seen, left)
            if length:
                chunks.append((sequence, length))
            left -= length
        return chunks

    def _compute(self) -> None:
        chunks = self._chunks()
        if not chunks and not self._decoding:
            return
        batch = self._batches.make(self._decoding, chunks)
        asked = wanted(batch, self._decoding)
        longest = max(s.place for s in self._decoding) + 1 if self._decoding else 0
        longest = max(longest, *(s.place + length for s, length in chunks), 0)
        logits = self.decoder.forward(batch, longest)
        for sequence in self._decoding:
            sequence.seen += 1
        for sequence, length in chunks:
            sequence.seen += length
        at_goal = [s for s, _ in chunks if s.seen == s.goal]
        drawn = self._ranks.shared(lambda: self._draw(logits, asked))
        for part, found in zip(asked.parts, drawn.parts, strict=True):
            part.sequence.prompt_logprobs += found
        for head in at_goal:
            self._promote(head)
        for sequence, token, logprob in zip(asked.rows, drawn.tokens, drawn.told, strict=True):
            self._tell(sequence, token, logprob)

    def _compute_metas(self) -> None:
        """The states after the meta tokens, by the weights that are there now."""
        metas = self._metas
        if metas is None:
            return
        self.states.empty(metas)
        metas.seen = 0
        batch = self._batches.make([], [(metas, len(metas.tokens))])
        batch.of_metas, batch.wanted = True, batch.tokens[:0]
        self.decoder.forward(batch, len(metas.tokens))
        metas.seen = len(metas.tokens)

    def _draw(self, logits: torch.Tensor | None, asked: Wanted) -> Drawn:
        assert logits is not None, "a rank of the last stage draws"
        return self._drawer.draw(logits, asked)

    def _promote(self, head: Sequence) -> None:
        """A sequence that is as far as was its goal, and its siblings, go on: each with what is
        left of its prompt, with new tokens, or to its end.
        """
        at = self._filling.index(head)
        for sibling in head.siblings:
            self.states.fork(head, sibling)
        family, head.siblings = [head, *head.siblings], []
        self._filling[at : at + 1] = [each for each in family if each.seen < each.goal]
        for sequence in family:
            if sequence.seen < sequence.goal:
                continue
            if not sequence.params.max_new_tokens:
                self._leave(sequence)
                self._events.append(self._event(sequence, None, None, "length"))
                continue
            self.states.swap(sequence.slot, len(self._decoding))
            self._decoding.append(sequence)

    def _tell(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        """Append a drawn token to its sequence, and end it where it is to end."""
        params, end = sequence.params, None
        first = sequence.new_tokens == 0
        if token in self._ends and not params.ignore_eod:
            end = "eod"
        else:
            sequence.tokens.append(token)
            if sequence.stopper is not None:
                sequence.stopper.add(token)
            if sequence.stopper is not None and sequence.stopper.stopped:
                end = "stop"
            elif sequence.new_tokens == params.max_new_tokens:
                end = "length"
        if end is not None:
            self._leave(sequence)
        self._events.append(self._event(sequence, token, logprob, end, with_prompt=first))

    @staticmethod
    def _event(
        sequence: Sequence,
        token: int | None,
        logprob: TokenLogprob | None,
        end: str | None,
        *,
        with_prompt: bool = True,
    ) -> Event:
        told = with_prompt and sequence.params.prompt_logprobs and sequence.tells
        prompt = tuple(sequence.prompt_logprobs) if told else None
        return Event(sequence.request, sequence.continuation, token, logprob, end, prompt)

    def _leave(self, sequence: Sequence) -> None:
        """Take everything back from a sequence; the last that decodes moves into its slot."""
        slot, last = sequence.slot, len(self._decoding) - 1
        decoded = 0 <= slot <= last and self._decoding[slot] is sequence
        self.states.release(sequence)
        if decoded:
            self.states.swap(slot, last)
            self._decoding[slot] = self._decoding[last]
            self._decoding.pop()
