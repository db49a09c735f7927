"""Generation: an engine that answers many requests at once, from a checkpoint or a live model.

    with Generator(Path("runs/web")) as generator:
        for completions in generator.generate(["The for statement", "Classes"], SamplingParams()):
            print(completions[0].text)

`Generator` is for scripts: lists in, lists out. Whatever takes requests as they come (a server)
uses its `engine`: `submit` at any time, `step` for events, `cancel`.
"""

from megatron_hybrid.generation.checkpoint import ONE_RANK
from megatron_hybrid.generation.generator import Generator
from megatron_hybrid.generation.params import Limits, SamplingParams
from megatron_hybrid.generation.request import Completion, Event, TokenLogprob
from megatron_hybrid.generation.text import TextStream

__all__ = [
    "ONE_RANK", "Completion", "Event", "Generator", "Limits", "SamplingParams", "TextStream",
    "TokenLogprob",
]  # fmt: skip
