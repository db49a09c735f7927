"""`megatron-hybrid convert ...`: checkpoints to and from Hugging Face's format."""

from megatron_hybrid.commands.app import App
from megatron_hybrid.commands.convert_verify import verify
from megatron_hybrid.commands.convert_weights import from_hf, to_hf

app = App(help="Convert checkpoints to and from Hugging Face.", no_args_is_help=True)
app.command("to-hf")(to_hf)
app.command("from-hf")(from_hf)
app.command("verify")(verify)
