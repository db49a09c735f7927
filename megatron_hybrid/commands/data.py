"""`megatron-hybrid data ...`: text to tokens, a look at them, and the plan of a run."""

from megatron_hybrid.commands.app import App
from megatron_hybrid.commands.data_inspect import show, stats, verify
from megatron_hybrid.commands.data_plan import CONFIG_WORDS, plan
from megatron_hybrid.commands.data_tokenize import tokenize

app = App(help="Make, check and plan the data of a run.", no_args_is_help=True)
app.command("tokenize")(tokenize)
app.command(
    "plan",
    context_settings=CONFIG_WORDS,
    options_metavar="PRESET|FILE.yaml [section.field=value | --flag value]... [OPTIONS]",
)(plan)
app.command("verify")(verify)
app.command("stats")(stats)
# Unknown options are numbers below 0, which the command refuses with the allowed ones.
app.command("show", context_settings={"ignore_unknown_options": True})(show)
