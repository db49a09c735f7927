"""A second opinion on an exported model: its logits in float64, from its files alone.

Slow and obvious, one token after the other, written from the published formulas and sharing no code
with the trainer or with transformers: when the two disagree, this says who is right. It knows the
layers of `nemotron_h` and `mamba2`: Mamba-2, attention without positions, squared-ReLU MLPs and
experts.

Legend: h hidden size, l tokens, V vocabulary; Mamba-2: H heads of p channels, d = H p, G groups, n
states, K taps of the convolution; attention: q query heads on k key/value heads of c channels; E
experts. A matrix is [out, in], so that `matrix @ vector` applies it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu, softplus

from checkpoints_converter.errors import ConversionError
from checkpoints_converter.loading_order import SINGLE_FILE, weight_map
from megatron_hybrid.small_files import read_json

Weights = dict[str, Tensor]
Layer = Callable[[Tensor], Tensor]  # the normed residual of one token [h] -> what is added [h]

# What transformers 5 has called the kinds of layers, and our symbols.
SYMBOLS = {
    "linear_attention": "M", "mamba": "M", "mamba2": "M", "full_attention": "*", "attention": "*",
    "mlp": "-", "moe": "E",
}  # fmt: skip
# Families that it knows, and what theirs is called in `nemotron_h`.
FAMILIES: dict[str, dict[str, str]] = {
    "nemotron_h": {},
    "mamba2": {
        "mamba_num_heads": "num_heads", "mamba_head_dim": "head_dim",
        "ssm_state_size": "state_size",
    },
}  # fmt: skip


class Trace(NamedTuple):
    """What came out for one sequence of l tokens.

    Attributes:
        residuals: `[layers, l, h]`, the residual stream after each layer.
        logits: `[l, V]`.
    """

    residuals: Tensor
    logits: Tensor


class Arbiter:
    """The model of an exported folder.

    Args:
        folder: with `config.json` and `*.safetensors` of a model of `FAMILIES`, small enough to be
            in memory in float64.
        dtype: of all arithmetic; in fp32 it shows what rounding does to this model.

    Raises:
        KeyError: a tensor or a field of the config is missing.
        ValueError: the model is of another type, or has biases where this knows none.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float64) -> None:
        config = _as_nemotron_h(read_json(folder / "config.json", ConversionError))
        weights: Weights = {}
        for file in sorted(set((weight_map(folder) or {"": SINGLE_FILE}).values())):
            weights |= load_file(folder / file)
        weights = {_plain_name(name): tensor.to(dtype) for name, tensor in weights.items()}
        biases = ("conv1d.bias", "dt_bias", "e_score_correction_bias")
        unknown = [name for name in weights if name.endswith("bias") and not name.endswith(biases)]
        if unknown:
            raise ValueError(f"biases that it does not know: {', '.join(unknown)}")
        self.config = config
        self.pattern = pattern_of(config)
        self.weights = weights

    def trace(self, tokens: Sequence[int]) -> Trace:
        """Residuals and logits of a sequence, from empty states."""
        config, weights = self.config, self.weights
        eps = config["layer_norm_epsilon"]
        layers: list[tuple[Tensor, Layer]] = []
        for index, symbol in enumerate(self.pattern):
            own = _below(weights, f"layers.{index}.mixer.")
            layers.append((weights[f"layers.{index}.norm.weight"], KINDS[symbol](config, own)))
        residuals, logits = [], []
        for token in tokens:
            residual = weights["embeddings.weight"][token]
            after_layers = []
            for norm_weight, layer in layers:
                residual = residual + layer(_rms_norm(residual, norm_weight, eps))
                after_layers.append(residual)
            residuals.append(torch.stack(after_layers))
            last = _rms_norm(residual, weights["norm_f.weight"], eps)
            output = weights.get("lm_head.weight", weights["embeddings.weight"])
            logits.append(output @ last)
        return Trace(torch.stack(residuals, dim=1), torch.stack(logits))


def _as_nemotron_h(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json under the names of `nemotron_h`, whose layers the other families have, too."""
    if config["model_type"] not in FAMILIES:
        raise ValueError(f"model_type={config['model_type']!r} must be {' or '.join(FAMILIES)}")
    names = FAMILIES[config["model_type"]]
    if config["model_type"] == "mamba2":
        config = config | {"hybrid_override_pattern": "M" * config["num_hidden_layers"]}
    return config | {ours: config[theirs] for ours, theirs in names.items()}


def pattern_of(config: dict[str, Any]) -> str:
    """The layers of a `nemotron_h` config.json, one symbol (`M`, `*`, `-`, `E`) each."""
    pattern = config.get("hybrid_override_pattern")
    return pattern or "".join(SYMBOLS[kind] for kind in config["layers_block_type"])


def _plain_name(name: str) -> str:
    """Without the prefix of the model, which releases spell differently."""
    name = name.removeprefix("backbone.").removeprefix("model.")
    return name.replace("embedding.weight", "embeddings.weight")


def _below(weights: Weights, prefix: str) -> Weights:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean() + eps) * weight


class _Mamba2:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t (Dao and Gu, 2024).

    The step size dt is clamped nowhere: nor is it in training.
    """

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        self.weights = weights
        self.heads, self.head_dim = config["mamba_num_heads"], config["mamba_head_dim"]
        self.groups, self.states = config["n_groups"], config["ssm_state_size"]
        self.eps = config["layer_norm_epsilon"]
        self.taps = weights["conv1d.weight"].squeeze(1)  # [d + 2 G n, K], the newest token last
        self.recent = torch.zeros_like(self.taps)
        self.state = self.taps.new_zeros(self.heads, self.head_dim, self.states)

    def __call__(self, x: Tensor) -> Tensor:
        w = self.weights
        inner, shared = self.heads * self.head_dim, self.groups * self.states
        sizes = [inner, inner + 2 * shared, self.heads]
        gate, convolved, dt = (w["in_proj.weight"] @ x).split(sizes)

        self.recent = torch.cat([self.recent[:, 1:], convolved[:, None]], dim=1)
        convolved = silu((self.recent * self.taps).sum(1) + w["conv1d.bias"])
        values, B, C = convolved.split([inner, shared, shared])
        heads_a_group = self.heads // self.groups
        B = B.view(self.groups, self.states).repeat_interleave(heads_a_group, dim=0)  # [H, n]
        C = C.view(self.groups, self.states).repeat_interleave(heads_a_group, dim=0)
        values = values.view(self.heads, self.head_dim)

        dt = softplus(dt + w["dt_bias"])
        decay = torch.exp(-dt * torch.exp(w["A_log"]))
        update = dt[:, None, None] * values[:, :, None] * B[:, None, :]
        self.state = decay[:, None, None] * self.state + update
        y = (self.state * C[:, None, :]).sum(-1) + w["D"][:, None] * values

        gated = (y.flatten() * silu(gate)).view(self.groups, -1)
        normed = gated * torch.rsqrt(gated.square().mean(1, keepdim=True) + self.eps)
        return w["out_proj.weight"] @ (normed.flatten() * w["norm.weight"])


class _Attention:
    """Softmax attention over all tokens so far; query head i reads key/value head i k / q."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        self.weights = weights
        self.query_heads = config["num_attention_heads"]
        self.kv_heads, self.channels = config["num_key_value_heads"], config["head_dim"]
        self.keys: list[Tensor] = []  # each [k, c]
        self.values: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        w = self.weights
        self.keys.append((w["k_proj.weight"] @ x).view(self.kv_heads, self.channels))
        self.values.append((w["v_proj.weight"] @ x).view(self.kv_heads, self.channels))
        queries = (w["q_proj.weight"] @ x).view(self.kv_heads, -1, self.channels)  # [k, q/k, c]
        scores = torch.einsum("kqc,tkc->kqt", queries, torch.stack(self.keys))
        shares = torch.softmax(scores / self.channels**0.5, dim=-1)
        mixed = torch.einsum("kqt,tkc->kqc", shares, torch.stack(self.values))
        return w["o_proj.weight"] @ mixed.flatten()


def _squared_relu_mlp(weights: Weights, x: Tensor) -> Tensor:
    return weights["down_proj.weight"] @ (weights["up_proj.weight"] @ x).relu().square()


def _mlp(config: dict[str, Any], weights: Weights) -> Layer:
    return lambda x: _squared_relu_mlp(weights, x)


class _Experts:
    """The best `num_experts_per_tok` of E by sigmoid score plus bias, and a shared one.

    The bias decides who is chosen; the shares are the scores without it. With groups, experts
    compete within the `topk_group` groups whose two best add up to most (DeepSeek-V3).
    """

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        self.config, self.weights = config, weights
        count = config["n_routed_experts"]
        self.experts = [_below(weights, f"experts.{index}.") for index in range(count)]
        self.shared = _below(weights, "shared_experts.")

    def __call__(self, x: Tensor) -> Tensor:
        w = self.weights
        scores = torch.sigmoid(w["gate.weight"] @ x)
        chosen = self._choose(scores + w["gate.e_score_correction_bias"])
        shares = scores[chosen]
        if self.config["norm_topk_prob"]:
            shares = shares / shares.sum()
        shares = shares * self.config["routed_scaling_factor"]
        narrow = w["fc1_latent_proj.weight"] @ x if "fc1_latent_proj.weight" in w else x
        routed = torch.zeros_like(narrow)
        for share, index in zip(shares, chosen.tolist(), strict=True):
            routed = routed + share * _squared_relu_mlp(self.experts[index], narrow)
        if "fc2_latent_proj.weight" in w:
            routed = w["fc2_latent_proj.weight"] @ routed
        return routed + _squared_relu_mlp(self.shared, x) if self.shared else routed

    def _choose(self, ranking: Tensor) -> Tensor:
        """Indices of the chosen experts from what ranks them `[E]`."""
        groups = self.config["n_group"]
        if groups > 1:
            of_group = ranking.view(groups, -1)
            best = of_group.topk(2, dim=1).values.sum(1).topk(self.config["topk_group"]).indices
            outside = torch.ones(groups, dtype=torch.bool)
            outside[best] = False
            ranking = of_group.masked_fill(outside[:, None], -torch.inf).flatten()
        return ranking.topk(self.config["num_experts_per_tok"]).indices


KINDS: dict[str, Callable[[dict[str, Any], Weights], Layer]] = {
    "M": _Mamba2, "*": _Attention, "-": _mlp, "E": _Experts,
}  # fmt: skip
