"""The rules across fields: small functions that yield a sentence for each thing that is wrong.

A rule gets the config and the `Facts` of the run. It is left at the first field that has a problem
of its own (see `config/partial.py`), so a bad value is reported once and hides nothing else.
"""

from megatron_hybrid.config.rules.common import Facts, Rule
from megatron_hybrid.config.rules.data import DATA, has_plan
from megatron_hybrid.config.rules.evaluation import EVALUATION, OWN_DATA
from megatron_hybrid.config.rules.files import DATA_FILES, FILES, INPUTS, data_given
from megatron_hybrid.config.rules.generation import GENERATION
from megatron_hybrid.config.rules.gpu import GPU
from megatron_hybrid.config.rules.heads import HEADS
from megatron_hybrid.config.rules.layers import LAYERS
from megatron_hybrid.config.rules.model import MODEL as OF_MODEL
from megatron_hybrid.config.rules.parallel import PARALLEL
from megatron_hybrid.config.rules.phases import PHASES, REPLACED_INSIDE
from megatron_hybrid.config.rules.precision import PRECISION
from megatron_hybrid.config.rules.prediction import PREDICTION
from megatron_hybrid.config.rules.run import REPLACED, RUN

MODEL: tuple[Rule, ...] = (*LAYERS, *OF_MODEL, *HEADS)
# For looking at a config, on a machine that may not hold its files.
NO_FILES: tuple[Rule, ...] = (
    *MODEL, *PARALLEL, *PRECISION, *GPU, *PREDICTION, *RUN, *DATA, *PHASES
)  # fmt: skip
# For planning the data of a run, which needs nothing else of the run.
PLAN: tuple[Rule, ...] = (*NO_FILES, has_plan, data_given, *DATA_FILES)
# Files that are named must be there, but data and tokenizer need not be named yet.
DRY_RUN: tuple[Rule, ...] = (*NO_FILES, *FILES)
ALL: tuple[Rule, ...] = (*DRY_RUN, *INPUTS)

__all__ = [
    "ALL", "DRY_RUN", "EVALUATION", "GENERATION", "MODEL", "NO_FILES", "OWN_DATA", "PLAN",
    "REPLACED", "REPLACED_INSIDE", "Facts", "Rule",
]  # fmt: skip
