"""Where Transformer Engine's Python is: in a folder of its own, which is in nobody's path.

Were it importable, the engine would meet half an installation in every other test.
"""

import os
import sys
from pathlib import Path

VARIABLE = "MEGATRON_HYBRID_TE_WHEELS"
# As tools/environment.sh makes it.
DEFAULT = Path(sys.prefix, "share", "transformer-engine")
COMMAND = (
    "python -m pip install --no-deps --constraint docker/constraints.txt "
    f"--target {DEFAULT} transformer-engine"
)


def find_folder() -> Path:
    """The folder of the variable, else the environment's own.

    Raises:
        FileNotFoundError: there is no Transformer Engine; with the command that puts it there.
    """
    folder = Path(os.environ.get(VARIABLE, DEFAULT))
    if not (folder / "transformer_engine" / "pytorch").is_dir():
        raise FileNotFoundError(f"no Transformer Engine in {folder}: {COMMAND}")
    return folder
