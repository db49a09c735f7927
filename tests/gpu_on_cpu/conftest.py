"""Tests here need Transformer Engine's Python, in its folder; `make` puts it there."""

import pytest

from tests.gpu_on_cpu.folder import find_folder


@pytest.fixture(scope="session", autouse=True)
def transformer_engine() -> None:
    """Skip all tests here where it is missing, with the command that brings it."""
    try:
        find_folder()
    except FileNotFoundError as error:
        pytest.skip(str(error))
