"""What every test run needs: GPU tests are skipped, by name, where there is no GPU."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Keep out of reports what the engine and torch warn of as the engine is imported."""
    for message in ("(Transformer Engine|Apex)", "`torch.jit", "The following imports from"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` without a CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
