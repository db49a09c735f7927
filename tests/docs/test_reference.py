"""The reference of the config is the one that the command prints."""

from typer.testing import CliRunner

from megatron_hybrid.cli import app
from megatron_hybrid.config.describe import fields
from tests.docs import ROOT


def test_the_reference_is_what_the_command_prints() -> None:
    """So that it cannot drift from the fields; each of them is in it, with its description."""
    done = CliRunner().invoke(app, ["config", "--reference"])
    assert done.exit_code == 0
    committed = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert done.stdout == committed, "megatron-hybrid config --reference > docs/reference.md"
    for path, info in fields().items():
        _, _, name = path.rpartition(".")
        assert f"| `{name}` |" in committed
        assert info.description
