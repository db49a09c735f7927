"""The arbiter: a token-by-token forward in float64 from the files of an exported model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_converter.arbiter import Arbiter
from tests.checkpoints_converter import peer_models

MODELS: list[tuple[str, dict[str, Any]]] = [
    ("MM", {}),
    ("M-M*-", {"num_key_value_heads": 1, "n_groups": 4}),
    ("M*-E", {"n_groups": 8, "num_key_value_heads": 4}),
    ("ME*E", {"n_group": 4, "topk_group": 2, "moe_latent_size": 12, "n_groups": 1}),
    ("E-", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
]


@pytest.mark.parametrize(("pattern", "fields"), MODELS, ids=[pattern for pattern, _ in MODELS])
def test_agrees_with_transformers(pattern: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Residuals and logits of every kind of layer, above the chunk size: 1e-5 of the deviation."""
    model = peer_models.nemotron_h(pattern, **fields)
    trace = Arbiter(peer_models.saved(model, tmp_path)).trace(peer_models.tokens()[0].tolist())
    outputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        logits = model(peer_models.tokens(), use_cache=False).logits[0]
    for index, output in enumerate(outputs):
        difference = (output[0] - trace.residuals[index]).abs().max()
        assert difference <= 1e-5 * trace.residuals[index].std(), f"layer {index}"
    assert (logits - trace.logits).abs().max() <= 1e-5 * trace.logits.std()


def test_sees_a_wrong_tensor(tmp_path: Path) -> None:
    """One changed number in the files is far above the tolerance: the comparison can fail."""
    model = peer_models.nemotron_h("M*-E")
    tokens = peer_models.tokens()[0].tolist()
    right = Arbiter(peer_models.saved(model, tmp_path / "right")).trace(tokens).logits
    with torch.no_grad():
        model.model.layers[0].mixer.D[0] += 0.01
    wrong = Arbiter(peer_models.saved(model, tmp_path / "wrong")).trace(tokens).logits
    assert (right - wrong).abs().max() > 1e-4 * right.std()


def test_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    """Another family, and biases that it would leave out, are errors."""
    model = peer_models.nemotron_h("M-", mlp_bias=True)
    with pytest.raises(ValueError, match=r"up_proj\.bias"):
        Arbiter(peer_models.saved(model, tmp_path))
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"nemotron_h"', '"bamba"'))
    with pytest.raises(ValueError, match="'bamba'"):
        Arbiter(tmp_path)
