"""Text from a checkpoint: greedy or sampled, one token at a time with KV cache and SSM states.

Legend: b sequences, s tokens, V padded vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_hybrid.bounds import LEAST_REAL, MOST_REAL, real_problem
from megatron_hybrid.checkpoint.reader import find_checkpoint
from megatron_hybrid.checkpoint.saved_config import read_config
from megatron_hybrid.config import RunConfig, rules
from megatron_hybrid.config.precision import FLOAT8_RECIPES
from megatron_hybrid.config.sections import PrecisionConfig
from megatron_hybrid.data.tokenizer import Tokenizer, load_tokenizer
from megatron_hybrid.errors import UserError
from megatron_hybrid.platform import initialize
from megatron_hybrid.platform.backend import resolve_backend
from megatron_hybrid.training.distributed import process_groups

# Whatever the ranks that trained it: one process generates.
ONE_RANK = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.sequence_parallel=false",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.virtual_pipeline_model_parallel_size=null",
    "parallel.context_parallel_size=1",
    "parallel.expert_model_parallel_size=1",
    "parallel.expert_tensor_parallel_size=1",
    "gpu.overlap_p2p_comm=false",
    "gpu.align_param_gather=false",
    "gpu.gradient_accumulation_fusion=false",
    "gpu.moe_shared_expert_overlap=false",
    "gpu.cuda_graph_impl=none",
    "gpu.cuda_graph_modules=[]",
    "training.recompute_granularity=null",
    "training.recompute_method=null",
    "training.recompute_num_layers=null",
    "training.recompute_modules=[]",
)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; above, logits are divided by it.
        top_k: only among the k likeliest; 0 for all.
        top_p: only among the likeliest whose probabilities first add up to p; 1 for all.
        seed: of the draws; the same seed gives the same text.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        problems = []
        if real_problem(self.temperature, positive=True) or self.temperature < 0:
            problems.append(
                f"temperature={self.temperature} must be at least 0 (0: greedy), or from "
                f"{LEAST_REAL:g} to {MOST_REAL:g}"
            )
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k} must be at least 0 (0: all tokens)")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} must be above 0 and at most 1 (1: all tokens)")
        if problems:
            raise UserError("\n".join(problems))


class Generator:
    """A model loaded for generation, on this process alone.

    Made by `open_checkpoint`, within whose block it can be used.
    """

    def __init__(self, config: RunConfig, model: torch.nn.Module, tokenizer: Tokenizer) -> None:
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """All at once, without a cache: `[b, s]` int64 -> `[b, s, V]` fp32."""
        return self.model(tokens, _positions(tokens, 0), None).float()

    @torch.no_grad()
    def stepwise_logits(self, tokens: Tensor, prompt_tokens: int) -> Iterator[Tensor]:
        """With the cache: the prompt, then the rest of `tokens` `[b, s]`, one at a time.

        Yields:
            `[b, V]` fp32, the logits after the prompt and after each token that follows it.
        """
        stepper = _Stepper(self.model, tokens.shape[0], tokens.shape[1])
        yield stepper.feed(tokens[:, :prompt_tokens])
        for place in range(prompt_tokens, tokens.shape[1]):
            yield stepper.feed(tokens[:, place : place + 1])

    @torch.no_grad()
    def generate(
        self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling
    ) -> Iterator[int]:
        """The tokens that follow a prompt, up to the end of the document or `max_new_tokens`.

        Raises:
            UserError: the prompt is empty.
        """
        if not prompt:
            raise UserError("the prompt is empty: give at least one character")
        device = next(self.model.parameters()).device
        draws = torch.Generator(device=device).manual_seed(sampling.seed)
        stepper = _Stepper(self.model, 1, len(prompt) + max_new_tokens)
        tokens = torch.tensor([prompt], device=device)
        for _ in range(max_new_tokens):
            logits = stepper.feed(tokens)[0, : self.vocab_size]
            token = choose(logits, sampling, draws)
            if token == self.tokenizer.eod:
                return
            yield token
            tokens = torch.tensor([[token]], device=device)


class _Stepper:
    """Feeds tokens to the model one piece after the other; the engine's context holds the states.

    Args:
        max_tokens: of prompt and continuation together; the KV cache is allocated for so many.
    """

    def __init__(self, model: torch.nn.Module, batch_size: int, max_tokens: int) -> None:
        from megatron.core.inference.contexts import StaticInferenceContext

        self.model = model
        self.context = StaticInferenceContext(batch_size, max_tokens)

    def feed(self, tokens: Tensor) -> Tensor:
        """`[b, s]` -> `[b, V]` fp32: the logits after the last of them."""
        from megatron.core.inference.utils import InferenceMode

        offset = self.context.sequence_len_offset
        with InferenceMode.active():
            logits = self.model(
                tokens,
                _positions(tokens, offset),
                None,
                inference_context=self.context,
                runtime_gather_output=True,
            )
        self.context.sequence_len_offset = offset + tokens.shape[1]
        self.context.enable_decode_mode()
        return logits[:, -1].float()


def choose(logits: Tensor, sampling: Sampling, draws: torch.Generator) -> int:
    """The next token from logits `[V]`."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    # The largest as 0, which no temperature makes infinite.
    logits = (logits - logits.max()) / sampling.temperature
    if sampling.top_k:
        lowest = torch.topk(logits, min(sampling.top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    probabilities, order = torch.softmax(logits, dim=-1).sort(descending=True)
    # A token stays if those before it have not reached p yet; the likeliest always does.
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=draws)])


def _positions(tokens: Tensor, offset: int) -> Tensor:
    places = torch.arange(offset, offset + tokens.shape[1], device=tokens.device)
    return places.expand_as(tokens)


@contextmanager
def open_checkpoint(checkpoint: Path, *, parse_special_tokens: bool = False) -> Iterator[Generator]:
    """Load the newest checkpoint under a folder, saved by any layout, for the time of the block.

    Args:
        checkpoint: as for `find_checkpoint`.
        parse_special_tokens: the tokenizer lets the text of a special token become its id.

    Raises:
        UserError: there is no whole checkpoint, or it cannot be loaded.
    """
    folder = find_checkpoint(checkpoint)
    # How a run of an earlier version was trained is for no rule of today's to judge.
    config = read_config(folder, *ONE_RANK, which=rules.MODEL)
    if config.model.attn_mask_type != "causal":
        raise UserError(
            f"{folder} has model.attn_mask_type={config.model.attn_mask_type}: each of its tokens "
            "sees all others, so that it cannot write one after the other; allowed: causal"
        )
    tokenizer = load_tokenizer(folder, parse_special_tokens=parse_special_tokens)
    with open_model(config, folder, tokenizer) as generator:
        yield generator


@contextmanager
def open_model(config: RunConfig, folder: Path, tokenizer: Tokenizer) -> Iterator[Generator]:
    """The model of one rank, with the weights of a checkpoint, for the time of the block.

    Args:
        config: of a single rank (`ONE_RANK`).
        folder: the checkpoint itself, `.../iter_0000100`, saved by any layout.

    Raises:
        UserError: it cannot be loaded, is of another model, or has fewer ids than the tokenizer.
    """
    config = config.with_vocab_size(tokenizer.vocab_size)
    if config.precision.recipe in FLOAT8_RECIPES:
        # The weights are bf16, and a token alone has no shape that float8 could take.
        config = config.model_copy(update={"precision": PrecisionConfig(recipe="bf16")})
    platform, backend = initialize(), resolve_backend("auto")
    with process_groups(config, platform, alone=True):
        from megatron_hybrid.model.build import build_model_chunks
        from megatron_hybrid.model.transformer_config import transformer_config
        from megatron_hybrid.training.checkpoint import load_checkpoint

        engine_config = transformer_config(config, backend, platform.device)
        (model,) = build_model_chunks(config, engine_config, backend)
        load_checkpoint(config, folder, [model], None, weights_only=True)
        model.eval()
        yield Generator(config, model, tokenizer)


def generate_text(
    checkpoint: Path,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    parse_special_tokens: bool = False,
) -> Iterator[str]:
    """The continuation of a prompt, piece by piece as it is generated (the prompt not included).

    Args:
        parse_special_tokens: let the text of a special token in the prompt become its id.

    Raises:
        UserError: the checkpoint or the prompt cannot be used.
    """
    with open_checkpoint(checkpoint, parse_special_tokens=parse_special_tokens) as generator:
        tokenizer = generator.tokenizer
        prompt_ids = tokenizer.encode(prompt)
        ids: list[int] = []
        text = shown = ""
        for token in generator.generate(prompt_ids, max_new_tokens, sampling):
            ids.append(token)
            # A character may be spread over several tokens: decode all, print what is settled.
            text = tokenizer.decode([*prompt_ids, *ids])[len(tokenizer.decode(prompt_ids)) :]
            if text.endswith("\N{REPLACEMENT CHARACTER}"):
                continue
            yield text[len(shown) :]
            shown = text
        if text != shown:  # it ends within a character
            yield text[len(shown) :]
