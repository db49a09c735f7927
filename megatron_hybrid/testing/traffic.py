"""What a rank sends, counted where torch hands it to the process group."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Within it, `sent_bytes` are those that this rank sends to single ranks and by all-to-alls.

    Args:
        ranks: of each group that exchanges all to all.

    Raises:
        NotImplementedError: another collective.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.sent_bytes = 0.0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func._schema.name  # type: ignore[attr-defined]
        if name == "c10d::send":
            self.sent_bytes += sum(each.nbytes for each in args[0])
        elif name == "c10d::alltoall_base_":
            self.sent_bytes += args[1].nbytes * (self.ranks - 1) / self.ranks
        elif name.startswith("c10d::") and name != "c10d::recv_":
            raise NotImplementedError(f"{name} is not counted")
        return func(*args, **(kwargs or {}))
