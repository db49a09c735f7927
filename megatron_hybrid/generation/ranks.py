"""How the ranks of an engine stay together: the first tells of requests, the last of tokens."""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_hybrid.generation.decoder import Decoder

T = TypeVar("T")


class Ranks:
    """All ranks of torch.distributed, of which each is in the same step.

    Attributes:
        many: whether there are others.
        first: whether this one takes the requests.
        ended: whether the first has ended the steps.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.many = dist.is_initialized() and dist.get_world_size() > 1
        self.ended, self.first = False, True
        self._device = decoder.device
        self._source = 0
        if self.many:
            self.first = dist.get_rank() == 0
            lasts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(lasts, decoder.last)
            self._source = lasts.index(True)

    def told(self, orders: Any) -> Any:
        """The orders of the first rank, on all."""
        if self.many:
            orders = self._broadcast(lambda: orders or None, 0) or type(orders)()
        self.ended = self.ended or orders.end
        return orders

    def shared(self, work: Callable[[], T]) -> T:
        """What `work` gives on a rank of the last stage, on all."""
        return self._broadcast(work, self._source) if self.many else work()

    def _broadcast(self, work: Callable[[], Any], source: int) -> Any:
        """One rank's object; only it does the work. It is our own, so that pickle may carry it."""
        here = dist.get_rank() == source
        size = torch.zeros(1, dtype=torch.long, device=self._device)
        data = b""
        if here:
            value = work()
            data = b"" if value is None else pickle.dumps(value)
            size.fill_(len(data))
        dist.broadcast(size, source)
        if not (count := int(size)):
            return None
        buffer = torch.empty(count, dtype=torch.uint8, device=self._device)
        if here:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(buffer, source)
        return value if here else pickle.loads(buffer.cpu().numpy().tobytes())
