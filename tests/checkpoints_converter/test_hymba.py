"""Hymba's folders: against a plain forward pass in float64, as transformers has no such model.

Legend: l tokens with the meta tokens before them, h hidden size, d channels of Mamba, n states.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints_converter.errors import ConversionError
from checkpoints_converter.export import ExportOptions, export
from checkpoints_converter.importing import ImportOptions, import_model, read_model
from checkpoints_converter.registry import family_for
from checkpoints_converter.weights import Names
from megatron_hybrid.config import load_config, rules
from megatron_hybrid.testing import run_distributed
from tests.checkpoints_converter.our_models import all_logits_and_gradients

# As the released 1.5B says them, with smaller sizes.
RELEASED: dict[str, Any] = {
    "model_type": "hymba", "architectures": ["HymbaForCausalLM"], "vocab_size": 61,
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 5,
    "num_attention_heads": 3, "num_key_value_heads": 3, "hidden_act": "silu",
    "mlp_hidden_act": "silu", "rms_norm_eps": 1e-6, "sliding_window": 6,
    "max_position_embeddings": 64, "orig_max_position_embeddings": 16, "rope": True,
    "rope_type": "ntk", "rope_theta": 10000.0, "num_memory_tokens": 4,
    "memory_tokens_interspersed_every": 0, "global_attn_idx": [0, 4],
    "kv_reuse_group": [[1, 2, 3]], "kv_reuse_every_i_layer": -1, "kv_weight_reuse": False,
    "attn_implementation_new": "flex", "kq_norm": "none", "kq_head_dim": -1, "v_head_dim": 16,
    "attn_hidden_size": -1, "mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_dt_rank": 3, "mamba_conv_bias": True, "mamba_proj_bias": False,
    "mamba_inner_layernorms": True, "num_mamba": 1, "num_experts": 1, "num_experts_per_tok": 1,
    "tie_word_embeddings": True, "seq_length": 32, "conv_dim": {"0": 48}, "layer_type": ["h"],
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "released": {},
    "untied, no window, two pairs": {
        "tie_word_embeddings": False, "sliding_window": None, "global_attn_idx": None,
        "kv_reuse_group": [[0, 1], [3, 4]], "rope_type": None, "num_key_value_heads": 1,
        "num_memory_tokens": 1,
    },
    "no group, no norms, relu2, steps of any rank": {
        "kv_reuse_group": None, "mamba_inner_layernorms": False, "mlp_hidden_act": "relu2",
        "mamba_dt_rank": "auto", "mamba_expand": 1, "global_attn_idx": [],
        "orig_max_position_embeddings": 64,
    },
}  # fmt: skip


def drawn(c: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors by their released names, every one random."""
    h, heads, groups = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    d, n, f = c["mamba_expand"] * h, c["mamba_d_state"], c["intermediate_size"]
    rank = -(-h // 16) if c["mamba_dt_rank"] == "auto" else c["mamba_dt_rank"]
    reusing = {each for group in c["kv_reuse_group"] or [] for each in group[1:]}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c["vocab_size"], h),
        "model.memory_tokens": (c["num_memory_tokens"], h),
        "model.final_layernorm.weight": (h,),
    }
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], h)
    for i in range(c["num_hidden_layers"]):
        keys = 0 if i in reusing else groups * (h // heads + d // heads)
        of_layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (h,), "pre_moe_layernorm.weight": (h,),
            "mamba.in_proj.weight": (h + keys + 2 * d, h), "mamba.out_proj.weight": (h, d),
            "mamba.conv1d.weight": (d, 1, 4), "mamba.conv1d.bias": (d,),
            "mamba.x_proj.0.weight": (rank + 2 * n, d), "mamba.dt_proj.0.weight": (d, rank),
            "mamba.dt_proj.0.bias": (d,), "mamba.A_log.0": (d, n), "mamba.D.0": (d,),
            "mamba.pre_avg_layernorm1.weight": (d,), "mamba.pre_avg_layernorm2.weight": (d,),
            "moe.experts.0.up_proj.weight": (f, h), "moe.experts.0.down_proj.weight": (h, f),
        }  # fmt: skip
        if c["mlp_hidden_act"] == "silu":
            of_layer["moe.experts.0.gate_proj.weight"] = (f, h)
        if c["mamba_inner_layernorms"]:
            for name, size in (("dt", rank), ("B", n), ("C", n)):
                of_layer[f"mamba.{name}_layernorm.weight"] = (size,)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in of_layer.items()}
    draws = torch.Generator().manual_seed(len(shapes))
    ranges = {"norm": (0.5, 1.5), "dt_proj.0.bias": (-3.0, 0.0), "A_log": (0.0, 1.5)}
    return {
        name: torch.empty(shape).uniform_(
            *next((r for part, r in ranges.items() if part in name), (-0.25, 0.25)), generator=draws
        )
        for name, shape in shapes.items()
    }


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def rotated(x: Tensor, c: dict[str, Any]) -> Tensor:
    """`[l, heads, channels]`, each at its place."""
    channels, base = x.shape[-1], c["rope_theta"]
    if c["rope_type"] == "ntk":
        longer = 2 * c["max_position_embeddings"] / c["orig_max_position_embeddings"] - 1
        base *= longer ** (channels / (channels - 2))
    rates = base ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angles = torch.outer(torch.arange(len(x), dtype=torch.float64), rates)[:, None]
    one, other = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), dim=-1)


def mamba(w: dict[str, Tensor], x: Tensor, gate: Tensor, c: dict[str, Any]) -> Tensor:
    """`[l, d]` twice -> `[l, d]`: token by token."""
    padded = F.pad(x, (0, 0, 3, 0))
    taps = w["conv1d.weight"][:, 0]
    x = F.silu(sum(padded[k : k + len(x)] * taps[:, k] for k in range(4)) + w["conv1d.bias"])
    n = c["mamba_d_state"]
    low, B, C = (x @ w["x_proj.0.weight"].T).split([len(w["x_proj.0.weight"]) - 2 * n, n, n], -1)
    if c["mamba_inner_layernorms"]:
        low, B, C = (
            norm(each, w[f"{name}_layernorm.weight"])
            for name, each in (("dt", low), ("B", B), ("C", C))
        )
    dt = F.softplus(low @ w["dt_proj.0.weight"].T + w["dt_proj.0.bias"])
    A, state, found = -w["A_log.0"].exp(), torch.zeros(x.shape[1], n, dtype=x.dtype), []
    for t in range(len(x)):
        state = state * (dt[t, :, None] * A).exp() + (dt[t] * x[t])[:, None] * B[t]
        found.append(state @ C[t] + w["D.0"] * x[t])
    return torch.stack(found) * F.silu(gate)


def logits_of(w: dict[str, Tensor], c: dict[str, Any], tokens: Tensor) -> Tensor:
    """`[s]` -> `[s, V]`, in the precision of the weights."""
    metas, heads = c["num_memory_tokens"], c["num_attention_heads"]
    groups = c["num_key_value_heads"]
    h = torch.cat((w["model.memory_tokens"], w["model.embed_tokens.weight"][tokens]))
    width = c["hidden_size"]
    d = c["mamba_expand"] * width
    place = torch.arange(len(h))
    distance = place[:, None] - place
    shared: dict[int, tuple[Tensor, Tensor]] = {}
    producer = {each: g[0] for g in c["kv_reuse_group"] or [] for each in g[1:]}
    for i in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        own = {name[len(prefix) :]: t for name, t in w.items() if name.startswith(prefix)}
        mixer = {name[6:]: t for name, t in own.items() if name.startswith("mamba.")}
        projected = norm(h, own["input_layernorm.weight"]) @ mixer["in_proj.weight"].T
        *qkv, x, z = projected.split(
            [width] + ([] if i in producer else [groups * width // heads, groups * d // heads])
            + [d, d], dim=-1,
        )  # fmt: skip
        query = rotated(qkv[0].unflatten(-1, (heads, -1)), c)
        if i not in producer:
            key = rotated(qkv[1].unflatten(-1, (groups, -1)), c)
            shared[i] = key, qkv[2].unflatten(-1, (groups, -1))
        key, value = (
            each.repeat_interleave(heads // groups, 1) for each in shared[producer.get(i, i)]
        )
        seen = distance >= 0
        everywhere = c["global_attn_idx"]
        if c["sliding_window"] and everywhere is not None and i not in everywhere:
            seen &= (distance <= c["sliding_window"]) | (place < metas)
        scores = torch.einsum("qnc,knc->nqk", query, key) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        attended = torch.einsum("nqk,knv->qnv", weights, value).flatten(1)
        scanned = mamba(mixer, x, z, c)
        joined = norm(attended, mixer["pre_avg_layernorm1.weight"])
        joined = (joined + norm(scanned, mixer["pre_avg_layernorm2.weight"])) / 2
        h = h + joined @ mixer["out_proj.weight"].T
        normed = norm(h, own["pre_moe_layernorm.weight"])
        up = normed @ own["moe.experts.0.up_proj.weight"].T
        if c["mlp_hidden_act"] == "silu":
            inner = F.silu(normed @ own["moe.experts.0.gate_proj.weight"].T) * up
        else:
            inner = up.relu().square()
        h = h + inner @ own["moe.experts.0.down_proj.weight"].T
    output = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(h[metas:], w["model.final_layernorm.weight"]) @ output.T


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By variant: its config, its folder, our checkpoint, tokens, and what each side computes."""
    found = []
    for number, (name, own) in enumerate(VARIANTS.items()):
        folder, c = tmp_path_factory.mktemp("hymba"), RELEASED | own
        (folder / "config.json").write_text(json.dumps(c))
        save_file(drawn(c), folder / "model.safetensors")
        done = import_model(folder, folder / "ours", ImportOptions())
        draws = torch.Generator().manual_seed(number)
        tokens = torch.randint(c["vocab_size"], (2, 21), generator=draws)
        found.append({"name": name, "config": c, "folder": folder, "ours": done, "tokens": tokens})
    checkpoints = [each["ours"].folder for each in found]
    tokens = [each["tokens"][:, :-1] for each in found]
    labels = [each["tokens"][:, 1:].contiguous() for each in found]
    (answers,) = run_distributed(all_logits_and_gradients, 1, checkpoints, tokens, labels)
    return [each | {"answer": answer} for each, answer in zip(found, answers, strict=True)]


def plain(
    folder: Path, c: dict[str, Any], tokens: Tensor, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits `[b, s, V]`, and gradients of the mean loss by released names."""
    weights = {
        name: tensor.to(dtype).requires_grad_()
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    logits = torch.stack([logits_of(weights, c, row[:-1]) for row in tokens])
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: tensor.grad for name, tensor in weights.items()}
    return logits.detach(), {name: grad for name, grad in gradients.items() if grad is not None}


@pytest.mark.parametrize("number", range(len(VARIANTS)), ids=list(VARIANTS))
def test_computes_what_a_plain_forward_does(converted: list[dict[str, Any]], number: int) -> None:
    """Logits and every gradient are within 1e-5 of the deviation and norms of those in float64, or
    within four times what rounds the plain pass itself in fp32."""
    each = converted[number]
    args = each["folder"], each["config"], each["tokens"]
    (wanted, exact), (rounded, near) = plain(*args, torch.float64), plain(*args, torch.float32)
    logits, gradients = each["answer"]
    logits = logits[..., : wanted.shape[-1]]
    most = max(1e-5 * wanted.std(), 4 * (rounded - wanted).abs().max())
    assert (logits - wanted).abs().max() <= most <= 1e-4 * wanted.std()
    model = each["ours"].config.model
    runs = [run for of in family_for(model).table(model, Names(), Names()) for run in of.runs]
    assert {run.theirs for run in runs} == exact.keys()
    for run in runs:
        ours, want, plainly = (
            tensor.flatten(1) if tensor.dim() > 1 else tensor
            for tensor in (gradients[run.ours], exact[run.theirs], near[run.theirs])
        )
        got = ours[run.our_row : run.our_row + run.count]
        of = want[run.their_row : run.their_row + run.count]
        most = max(1e-5 * want.norm(), 4 * (plainly - want).norm())
        assert (got - of).norm() <= most <= 1e-3 * want.norm(), run.theirs


@pytest.mark.parametrize("number", range(len(VARIANTS)), ids=list(VARIANTS))
def test_comes_back(converted: list[dict[str, Any]], number: int, tmp_path: Path) -> None:
    """Every tensor bit for bit, and a config.json of the same model."""
    each = converted[number]
    done = export(each["ours"].folder, tmp_path / "back", ExportOptions())
    assert done.family == "hymba"
    before = load_file(each["folder"] / "model.safetensors")
    after = load_file(done.folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    _, _, first = read_model(each["folder"])
    _, _, again = read_model(done.folder)
    assert first == again


WRONG = {
    "attn_implementation_new": ("sdpa", "must be 'flex'"),
    "kq_norm": ("rms", "must be 'none'"),
    "memory_tokens_interspersed_every": (8, "must be 0"),
    "rope_type": ("dynamic_ntk", "must be None or 'default' or 'ntk'"),
    "kv_reuse_group": ([[1, 3]], "must have layer 3 share with the nearest one before it"),
    "kv_weight_reuse": (True, "must be False"),
    "global_attn_idx": ([9], "must be of the 5 layers, from 0"),
    "mamba_proj_bias": (True, "must be False"),
    "num_attention_heads": (7, "must divide hidden_size=24"),
    "mamba_d_convs": (3, "is a field that is not known here"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refuses_what_it_does_not_compute(name: str, tmp_path: Path) -> None:
    """In one sentence with the field and its value."""
    value, why = WRONG[name]
    (tmp_path / "config.json").write_text(json.dumps(RELEASED | {name: value}))
    with pytest.raises(ConversionError, match="cannot be held exactly") as caught:
        read_model(tmp_path)
    assert f"{name}=" in str(caught.value) and why in str(caught.value)


def test_exports_only_what_its_code_computes() -> None:
    """The preset is of the family; changes of it are refused by field."""
    assert family_for(load_config(["hymba_125m"], which=rules.NO_FILES).model).model_type == "hymba"
    changes = {
        "model.num_meta_tokens=0": "model.num_meta_tokens=0 must be at least 1",
        "model.kv_channels=32": "must make model.hidden_size=512",
        "model.layers.3.window_size=[512,0]": "windows [512, 0], [1024, 0] must be one",
        "model.layers.6.ffn_hidden_size=512": "of layer 6 must be 1664, as of layer 2",
        "model.mamba_intermediate_size=1280": "must be a multiple of model.hidden_size=512",
    }
    for change, why in changes.items():
        model = load_config(["hymba_125m", change], which=rules.NO_FILES).model
        with pytest.raises(ConversionError) as caught:
            family_for(model, "hymba")
        assert why in str(caught.value)
