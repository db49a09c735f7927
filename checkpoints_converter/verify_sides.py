"""The sides that `verify` compares: our model from the checkpoint, transformers' from the export.

Both compute in fp32 on the CPU, one after the other, so that one model at a time is in memory. What
the export rounded (fp32 weights saved as bf16) is rounded in ours, too: all that is left to differ
is the arithmetic.

Legend: l tokens of a prompt, h hidden size, V vocabulary without padding.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from checkpoints_converter.errors import ConversionError
from checkpoints_converter.releases import OLDEST_TRANSFORMERS
from checkpoints_converter.safetensors_files import SafetensorsReader
from megatron_hybrid.config import RunConfig
from megatron_hybrid.data.tokenizer import Tokenizer

# Of the last part of a parameter's name: ours -> theirs, where they differ.
THEIR_LEAVES = {"expert_bias": "e_score_correction_bias"}


@dataclass(frozen=True)
class Prompt:
    """What both models are given.

    Attributes:
        text: what the tokens were made from; None where they were drawn.
    """

    name: str
    tokens: tuple[int, ...]
    text: str | None = None


@dataclass
class Answer:
    """What a model makes of one prompt.

    Attributes:
        residuals: `[l, h]` after each of its blocks, fp32.
        logits: `[l, V]` fp32.
        continuation: greedy tokens after the prompt, without the one that ends the document.
        margins: by how much the likeliest token leads at each step of the continuation, and after
            it (ours only).
        router_margins: `[l + continuation]`, by how much the last chosen expert leads the next, in
            deviations of the scores; the least of all MoE layers (ours only).
    """

    residuals: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    continuation: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    router_margins: Tensor = field(default_factory=lambda: torch.empty(0))


def require_transformers() -> str:
    """The version of transformers that is installed.

    Raises:
        ConversionError: none, or one that computes Mamba-2 wrongly.
    """
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise ConversionError(
            "convert verify needs transformers, which is not installed: "
            "pip install 'megatron-hybrid[convert]'"
        ) from None
    if Version(found) < OLDEST_TRANSFORMERS:
        raise ConversionError(
            f"transformers {found} is installed; releases before {OLDEST_TRANSFORMERS} compute "
            "Mamba-2 wrongly for sequences longer than one chunk (5.8.0 to 5.14.1) or lack its "
            f"models; allowed: {OLDEST_TRANSFORMERS} and later"
        )
    return found


@contextmanager
def _residuals(layers: Sequence[nn.Module], batch_first: bool) -> Iterator[list[Tensor]]:
    """Fills with `[l, h]` fp32, the output of each layer, as a forward pass goes through them."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append((hidden[0] if batch_first else hidden[:, 0]).float().clone())

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _router_margins(model: nn.Module) -> Iterator[list[Tensor]]:
    """Fills with `[l]`, a MoE layer after the other, as a forward pass goes through them.

    Where the scores of two experts are alike but for rounding, either may be chosen, and the models
    part: that is no mistake of the conversion.
    """
    seen: list[Tensor] = []

    def keep(router: Any, inputs: tuple[Tensor, ...], _: Any) -> None:
        logits = torch.nn.functional.linear(inputs[0][:, 0].float(), router.weight.float())
        scores = logits.sigmoid() if router.score_function == "sigmoid" else logits
        if router.expert_bias is not None:
            scores = scores + router.expert_bias
        if scores.shape[1] > router.topk:
            best = scores.topk(router.topk + 1).values
            seen.append((best[:, -2] - best[:, -1]) / scores.std())

    # Not before the platform is initialized, which speeds the engine's import up.
    from megatron.core.transformer.moe.router import TopKRouter

    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    handles = [router.register_forward_hook(keep) for router in routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def our_answers(
    folder: Path,
    config: RunConfig,
    tokenizer: Tokenizer,
    export: Mapping[str, torch.dtype],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
) -> list[Answer]:
    """What our model makes of the prompts.

    Args:
        config: fp32, of a single rank.
        export: dtypes of the exported tensors, by name.

    Raises:
        UserError: the checkpoint cannot be loaded.
    """
    from megatron_hybrid.generation import Generator, Limits, SamplingParams

    answers = []
    with Generator.of_checkpoint(config, folder, tokenizer) as generator:
        model: Any = generator.chunks[0]
        longest = max(len(prompt.tokens) for prompt in prompts) + max_new_tokens
        generator.limits = Limits(max_sequences=1, max_tokens=longest)
        asked = SamplingParams(max_new_tokens=max_new_tokens)
        _round_as_exported(model, export)
        assert config.model.vocab_size is not None
        generator.vocab_size = config.model.vocab_size
        for prompt in prompts:
            answer = Answer()
            tokens = torch.tensor([prompt.tokens])
            with _residuals(model.decoder.layers, batch_first=False) as answer.residuals:
                answer.logits = generator.logits(tokens)[0, :, : generator.vocab_size]
            [[completion]] = generator.generate([prompt.tokens], asked)
            answer.continuation = completion.tokens
            whole = torch.tensor([[*prompt.tokens, *answer.continuation]])
            with _router_margins(model) as margins:
                logits = generator.logits(whole)[0, len(prompt.tokens) - 1 :]
            answer.router_margins = torch.stack(
                [torch.full((whole.shape[1],), torch.inf), *margins]
            ).amin(0)
            logits = logits[:, : generator.vocab_size]
            best = logits.topk(2).values
            answer.margins = (best[:, 0] - best[:, 1]).tolist()
            answers.append(answer)
        generator.close()
        del generator.chunks, model
    gc.collect()
    return answers


def _round_as_exported(model: nn.Module, export: Mapping[str, torch.dtype]) -> None:
    """Round every parameter of an fp32 model to the dtype in which it was exported.

    All tensors of one role (the last part of their names) have one dtype.
    """
    by_leaf = {name.rpartition(".")[2]: dtype for name, dtype in export.items()}
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            leaf = name.rpartition(".")[2]
            dtype = by_leaf.get(THEIR_LEAVES.get(leaf, leaf), by_leaf["weight"])
            tensor.copy_(tensor.to(dtype))


def their_answers(
    folder: Path, prompts: Sequence[Prompt], max_new_tokens: int, eod: int
) -> list[Answer]:
    """What transformers makes of the prompts, with the exported model.

    Args:
        eod: the token that ends a document, at which a continuation ends.

    Raises:
        ConversionError: transformers cannot load it, or finds tensors missing or unknown.
    """
    from transformers import GenerationConfig

    model = _load(folder)
    # The folder's own may ask for penalties, beams and least lengths: that is not greedy text.
    model.generation_config = GenerationConfig()
    # The default cache of transformers wants an attention layer.
    use_cache = "full_attention" in (getattr(model.config, "layer_types", None) or [])
    answers = []
    for prompt in prompts:
        answer = Answer()
        tokens = torch.tensor([prompt.tokens])
        with torch.no_grad():
            with _residuals(model.base_model.layers, batch_first=True) as answer.residuals:
                answer.logits = model(tokens, use_cache=False).logits[0].float()
            whole = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=use_cache,
                eos_token_id=eod,
                pad_token_id=eod,
            )
        answer.continuation = whole[0, len(prompt.tokens) :].tolist()
        if answer.continuation[-1:] == [eod]:
            answer.continuation.pop()
        answers.append(answer)
    return answers


def _load(folder: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # any part of transformers may stumble, in its own way
        raise ConversionError(f"transformers cannot load {folder}: {error}") from error
    model, info = loaded
    problems = [
        f"  - {what.removesuffix('_keys')}: {', '.join(map(str, sorted(names)))}"
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if (names := info.get(what))
    ]
    if problems:  # it would go on with random weights
        raise ConversionError(
            "\n".join([f"tensors of {folder} are not what transformers expects:", *problems])
        )
    return model.eval()


def exported_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Dtypes of the tensors of an exported folder, by name."""
    reader = SafetensorsReader(folder)
    return {name: info.dtype for name, info in reader.tensors.items()}
