"""The engine's loop: one thread has the engine, the others hand requests in and get events."""

import time
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Lock

from megatron_hybrid.generation.engine import Engine
from megatron_hybrid.generation.params import SamplingParams
from megatron_hybrid.generation.request import Event
from megatron_hybrid.generation.serving.refused import RefusedError

# How long the loop waits for a request before it looks whether it is to end.
_LOOK_S = 0.2
# Other ranks wait in a collective, which gives up after 30 minutes.
KEEP_IN_STEP_S = 60.0


class Ticket:
    """Prompts of one client under way.

    Attributes:
        events: (prompt's number, event); None where there will be no more.
        left: continuations of each prompt that have not ended.
    """

    def __init__(self, prompts: list[list[int]], params: SamplingParams) -> None:
        self.prompts, self.params = prompts, params
        self.events: SimpleQueue[tuple[int, Event] | None] = SimpleQueue()
        self.left = [params.n] * len(prompts)


class Loop:
    """Requests of all clients through one engine.

    Args:
        max_queue: continuations that may wait for a slot.
        followers: whether other ranks take part in its steps.
    """

    def __init__(self, engine: Engine, max_queue: int, *, followers: bool = False) -> None:
        self._engine, self._followers = engine, followers
        self._most = engine.limits.max_sequences + max_queue
        self._inbox: SimpleQueue[tuple[Ticket, bool]] = SimpleQueue()  # and whether it is wanted
        self._requests: dict[int, tuple[Ticket, int]] = {}  # by the engine's numbers
        self._lock = Lock()
        self._open = 0  # continuations that have not ended
        self._closed = False
        self._last_step = time.monotonic()

    # -- from any thread ---------------------------------------------------------------------------

    def problems(self, prompt: list[int], params: SamplingParams) -> list[str]:
        """Why the engine could never answer, a sentence each."""
        return self._engine.problems(prompt, params)

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._closed

    def hand_in(self, prompts: list[list[int]], params: SamplingParams) -> Ticket:
        """Take prompts in, of which `problems` has none.

        Raises:
            RefusedError: there is no room now, or never, or the server is ending.
        """
        ticket, asked = Ticket(prompts, params), len(prompts) * params.n
        if asked > self._most:
            raise RefusedError(
                400,
                f"{len(prompts)} prompts with n={params.n} are {asked} answers; allowed: at most "
                f"{self._most} at once (--max-sequences and --max-queue)",
                param="n" if len(prompts) == 1 else "prompt",
            )
        with self._lock:
            if self._closed:
                raise RefusedError(503, "the server is ending")
            if self._open + asked > self._most:
                raise RefusedError(
                    429, f"the queue is full: {self._open} answers are under way or wait, of at "
                    f"most {self._most}", code="queue_full", headers={"Retry-After": "1"},
                )  # fmt: skip
            self._open += asked
            # Within the lock, so that nothing comes after `close`.
            self._inbox.put((ticket, True))
        return ticket

    def give_up(self, ticket: Ticket) -> None:
        """Nobody wants the rest of it; nothing where it has ended."""
        if any(ticket.left):
            self._inbox.put((ticket, False))

    # -- from the thread of the engine -------------------------------------------------------------

    @property
    def open(self) -> bool:
        """Whether anybody waits for an answer."""
        return self._open > 0

    def turn(self) -> None:
        """Take in what has come, and one step; without anything to do, wait a moment."""
        self._take_in()
        idle_s = time.monotonic() - self._last_step
        if self._engine.busy or (self._followers and idle_s >= KEEP_IN_STEP_S):
            for event in self._engine.step():
                self._pass_on(event)
            self._last_step = time.monotonic()

    def close(self) -> None:
        """Take no more requests."""
        with self._lock:
            self._closed = True

    def end(self) -> None:
        """Tell all that still wait that nothing will come."""
        self.close()
        with suppress(Empty):
            while True:
                self._inbox.get_nowait()[0].events.put(None)
        for ticket, _ in self._requests.values():
            ticket.events.put(None)

    def _take_in(self) -> None:
        with suppress(Empty):
            self._take(*self._inbox.get(timeout=0 if self._engine.busy else _LOOK_S))
            while True:
                self._take(*self._inbox.get_nowait())

    def _take(self, ticket: Ticket, wanted: bool) -> None:
        if wanted:
            for index, prompt in enumerate(ticket.prompts):
                self._requests[self._engine.submit(prompt, ticket.params)] = (ticket, index)
            return
        for number, (each, _) in self._requests.items():
            if each is ticket:
                self._engine.cancel(number)

    def _pass_on(self, event: Event) -> None:
        ticket, index = self._requests[event.request]
        if event.end is not None:
            ticket.left[index] -= 1
            if not ticket.left[index]:
                del self._requests[event.request]
            with self._lock:
                self._open -= 1
        ticket.events.put((index, event))
