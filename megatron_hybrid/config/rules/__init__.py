"""The rules across fields: small functions that yield a sentence for each thing that is wrong.

A rule gets the config and the `Facts` of the run. It is left at the first field that has a problem
of its own (see `config/partial.py`), so a bad value is reported once and hides nothing else.
"""

from megatron_hybrid.config.rules.common import Facts, Rule
from megatron_hybrid.config.rules.files import FILES, INPUTS
from megatron_hybrid.config.rules.model import MODEL
from megatron_hybrid.config.rules.parallel import PARALLEL
from megatron_hybrid.config.rules.run import ALTERNATIVES, RUN

# For looking at a config, on a machine that may not hold its files.
NO_FILES: tuple[Rule, ...] = (*MODEL, *PARALLEL, *RUN)
# Files that are named must be there, but data and tokenizer need not be named yet.
DRY_RUN: tuple[Rule, ...] = (*NO_FILES, *FILES)
ALL: tuple[Rule, ...] = (*DRY_RUN, *INPUTS)

__all__ = ["ALL", "ALTERNATIVES", "DRY_RUN", "NO_FILES", "Facts", "Rule"]
