"""A server from its first request to its last."""

import logging
import time
from itertools import count

import torch.distributed as dist

from megatron_hybrid.errors import UserError
from megatron_hybrid.generation.generator import Generator
from megatron_hybrid.generation.params import SamplingParams
from megatron_hybrid.generation.serving.asked import Served
from megatron_hybrid.generation.serving.chat import ChatPrompts
from megatron_hybrid.generation.serving.loop import Loop
from megatron_hybrid.generation.serving.server import Api, Server
from megatron_hybrid.training.signals import ExitSignals

logger = logging.getLogger(__name__)

# After a signal: for the answers under way to end, and then to be read.
GRACE_S, READ_S = 30.0, 5.0


def serve(
    generator: Generator,
    server: Server | None,
    name: str,
    defaults: SamplingParams,
    *,
    max_queue: int,
    special_in_texts: bool = False,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C; those under way then have `GRACE_S` to end.

    Args:
        server: of the first rank; the others follow it.
        name: of the model.
        defaults: of what a request does not say; its seed is the first request's, from which those
            of later ones count on.
        max_queue: continuations that may wait for a slot.
        special_in_texts: as of `ChatPrompts`.

    Raises:
        UserError: the place of the server is taken.
    """
    with ExitSignals() as signals:
        if server is None:
            generator.follow()
            return
        loop = Loop(generator.engine, max_queue, followers=dist.get_world_size() > 1)
        try:
            chat: ChatPrompts | str = ChatPrompts(
                generator.tokenizer, special_in_texts=special_in_texts
            )
        except UserError as error:
            chat = str(error)
            logger.warning("no chat: %s", chat)
        served = Served(
            name, int(time.time()), generator.tokenizer, defaults, count(defaults.seed),
            generator.encode, loop.problems, chat,
        )  # fmt: skip
        try:
            server.open(Api(served, loop))
            logger.info("serving %s at %s/v1 (Ctrl-C ends)", name, server.url)
            while signals.requested() is None:
                loop.turn()
            logger.info("%s: answering what is under way", signals.requested())
            loop.close()
            end = time.monotonic() + GRACE_S
            while loop.open and time.monotonic() < end:
                loop.turn()
        finally:
            loop.end()
            server.close()
            server.wait(READ_S)
