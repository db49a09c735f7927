#!/usr/bin/env bash
# Every config of transformers takes per_layer_config, and saves and loads it; the models that pruned
# checkpoints are made of cannot be built from it.
#
# Layers of unlike sizes, as pruning and architecture search leave them, are thought to need no more
# than this field: "attributes that differ from the global config for that layer". The config is made
# without a word and comes back from its file as it was. Then the model's own layers ask the global
# config for the size, which answers only where no layer differs: so with a dense model (llama) and with
# all hybrids of Mamba-2 that were tried, by any field.
#
# transformers 5.24.0, torch 2.13.0, Python 3.12. Seen, for each of llama, nemotron_h, mamba2, bamba,
# granitemoehybrid and falcon_h1:
#   the config comes back from its file: True
#   built with the size in one layer: AmbiguousGlobalPerLayerAttributeError
#   built with no size of a layer's own: True
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-cache-dir transformers==5.24.0 torch==2.13.0

cat >"$folder/try.py" <<'PYTHON'
import sys

from transformers import AutoConfig, AutoModelForCausalLM

folder = sys.argv[1]
sizes = {
    "hidden_size": 32, "vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "intermediate_size": 64,
}
mamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2}
models = {
    "llama": ({}, "intermediate_size"),
    "nemotron_h": (
        {"layers_block_type": ["mamba", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 8,
         "ssm_state_size": 8, "n_groups": 2, "head_dim": 8},
        "intermediate_size",
    ),
    "mamba2": ({"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2}, "state_size"),
    "bamba": (mamba | {"attn_layer_indices": [1]}, "intermediate_size"),
    "granitemoehybrid": (
        mamba | {"num_local_experts": 0, "shared_intermediate_size": 64,
                 "layer_types": ["linear_attention", "full_attention"]},
        "shared_intermediate_size",
    ),
    "falcon_h1": (mamba | {"mamba_d_ssm": 64}, "intermediate_size"),
}
seen = set()
for name, (own, field) in models.items():
    plain = AutoConfig.for_model(name, **sizes | own)
    unlike = AutoConfig.for_model(name, **sizes | own, per_layer_config={1: {field: 4}})
    unlike.save_pretrained(f"{folder}/{name}")
    back = AutoConfig.from_pretrained(f"{folder}/{name}")
    kept = getattr(back.per_layer_config[1], field) == 4
    built = AutoModelForCausalLM.from_config(plain) is not None
    try:
        AutoModelForCausalLM.from_config(unlike)
        error = "none"
    except Exception as caught:
        error = type(caught).__name__
    print(f"{name}: the config comes back from its file: {kept}")
    print(f"{name}: built with the size in one layer: {error}")
    print(f"{name}: built with no size of a layer's own: {built}")
    seen.add((kept, error, built))
sys.exit(seen != {(True, "AmbiguousGlobalPerLayerAttributeError", True)})
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
