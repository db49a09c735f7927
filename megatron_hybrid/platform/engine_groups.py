"""Several layouts of the engine's process groups over the same ranks, of which one is in force.

megatron-core keeps its groups in `parallel_state`, which layers, schedules and checkpoints ask as
they are built and as they run. A frozen model in another layout than the one that is trained is
built, loaded and run while that module's variables are those of its own layout.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megatron.core import parallel_state

# As the module has them when it is imported; what is not None there.
_FRESH = {"_HYBRID_DP_CP_GROUPS": dict}
_VIRTUAL_STAGES = (
    "_VIRTUAL_PIPELINE_MODEL_PARALLEL_RANK", "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE",
)  # fmt: skip


class EngineGroups:
    """What `parallel_state` knows of one layout.

    Args:
        state: its variables by name.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = dict(state)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Within it the engine knows this layout and no other."""
        others = _state()
        _set(self._state)
        try:
            yield
        finally:
            self._state = _state()
            _set(others)


def present_groups() -> EngineGroups:
    """The layout in force, without its virtual pipeline stages."""
    return EngineGroups(_state() | dict.fromkeys(_VIRTUAL_STAGES))


def further_groups(initialize: Callable[[], None]) -> EngineGroups:
    """Another layout, beside the one in force. All ranks call it together.

    Args:
        initialize: makes its groups, as `parallel_state.initialize_model_parallel` does.
    """
    found = EngineGroups({name: _FRESH.get(name, _nothing)() for name in _state()})
    with found.in_force():
        initialize()
    return found


def _nothing() -> None:
    return None


def _state() -> dict[str, Any]:
    """The module's variables: `_TENSOR_MODEL_PARALLEL_GROUP` and the like."""
    return {
        name: value
        for name, value in vars(parallel_state).items()
        if (name.startswith("_") and name.isupper()) or name == "_global_process_group_list"
    }


def _set(state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        setattr(parallel_state, name, value)
