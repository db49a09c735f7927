"""`megatron-hybrid compress ...`: from a trained model to a smaller one."""

from megatron_hybrid.commands.app import App
from megatron_hybrid.commands.compress_prune import prune
from megatron_hybrid.commands.compress_score import score

_CONFIG_WORDS = {"allow_extra_args": True, "ignore_unknown_options": True}

app = App(help="Make a trained model smaller.", no_args_is_help=True)
app.command(
    "score",
    context_settings=_CONFIG_WORDS,
    options_metavar="[OPTIONS] [section.field=value]...",
)(score)
app.command(
    "prune",
    context_settings=_CONFIG_WORDS,
    options_metavar="[OPTIONS] [section.field=value | --flag value]...",
)(prune)
