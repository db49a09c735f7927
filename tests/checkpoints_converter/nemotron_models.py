"""Which tiny nemotron_h models are converted: every kind of layer, grouping and odd size."""

from typing import Any

# name -> (pattern, fields beside those of `peer_models.nemotron_h`)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba only": ("MMM", {}),
    "dense": ("M-M*-", {}),
    "attention first": ("*-M", {}),
    "attention only": ("*-*-", {}),
    "mlp only": ("--", {}),
    "one group": ("M-M*-", {"n_groups": 1}),
    "four groups": ("M-M*-", {"n_groups": 4}),
    "eight groups": ("MM*-", {"n_groups": 8}),
    "multi-query": ("M*-", {"num_key_value_heads": 1}),
    "multi-head": ("M*-", {"num_key_value_heads": 4}),
    "odd head sizes": (
        "M*M-",
        {"head_dim": 7, "mamba_head_dim": 5, "mamba_num_heads": 6, "ssm_state_size": 9},
    ),
    "odd widths": ("M-*", {"hidden_size": 30, "intermediate_size": 37, "vocab_size": 101}),
    "moe": ("MEM*E", {}),
    "moe and dense": ("M-ME*-E", {}),
    "two experts a token": ("ME*E", {"routed_scaling_factor": 1.0, "num_experts_per_tok": 2}),
    "one expert a token": ("ME*E", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    "many experts": ("MEE*", {"n_routed_experts": 16, "num_experts_per_tok": 6}),
    "latent experts": ("ME*E", {"moe_latent_size": 12}),
    "groups of experts": (
        "MEE*",
        {
            "n_routed_experts": 12,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 4,
            "moe_latent_size": 8,
        },
    ),
    "gelu": ("M-*E", {"mlp_hidden_act": "gelu"}),
    "wide heads": ("M*-", {"num_attention_heads": 2, "head_dim": 32, "num_key_value_heads": 1}),
}
