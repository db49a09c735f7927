"""A folder of files that the wrong configs name: good ones, halves, and broken ones.

In their texts {tmp} is the folder.
"""

from pathlib import Path

FILES = {
    "good.bin": "",
    "good.idx": "",
    "half.bin": "",
    **{
        f"{name}.{end}": ""
        for name in ("web", "code_0", "code_1", "math_a")
        for end in ("bin", "idx")
    },
    "torn_b.idx": "",
    "phases.yaml": """preset: tiny
data:
  sources:
    web: {path: "{tmp}/web"}
    code: {path: ["{tmp}/code_0", "{tmp}/code_1"], max_epochs: 4}
    math: {path: "{tmp}/math_*", fraction: 0.5}
  phases:
    - {name: start, weights: {web: 6, code: 4}}
    - {name: middle, start_fraction: 0.6, weights: {web: 4, code: 4, math: 2}}
    - {name: end, last_tokens: 200e3, seq_length: 512, weights: {code: 1, math: 1}}
  tokenizer_type: null
model:
  vocab_size: 256
training:
  train_tokens: 1e6
""",
    "blend.yaml": """preset: tiny
data:
  data_path: [0.6, "{tmp}/web", 0.4, "{tmp}/code_0"]
  tokenizer_type: null
model:
  vocab_size: 256
""",
    "tokenizer.model": "",
    "not_a_mapping.yaml": "- model\n- data\n",
    "syntax.yaml": "model:\n  hidden_size: [64\n",
    "twice.yaml": "preset: tiny\nmodel:\n  hidden_size: 64\n  hidden_size: 128\n",
    "tabs.yaml": "model:\n\thidden_size: 64\n",
    "star.yaml": "preset: tiny\nmodel:\n  layers:\n    *: {window_size: [8, 0]}\n",
    "star_pattern.yaml": "preset: tiny\nmodel:\n  hybrid_layer_pattern: *M\n",
    "no_preset.yaml": "preset: tinny\n",
    "model_is_a_number.yaml": "preset: tiny\nmodel: 3\n",
    "unknown_section.yaml": "preset: tiny\nparalel:\n  tensor_model_parallel_size: 2\n",
    "unknown_field.yaml": "preset: tiny\ntraining:\n  batch_size: 8\n",
    "top_level_field.yaml": "preset: tiny\nhidden_size: 64\n",
    "quoted_number.yaml": 'preset: tiny\nmodel:\n  hidden_size: "64"\n',
    "number_as_text.yaml": "preset: tiny\ndata:\n  split: 100\n",
    "only_a_name.yaml": "run_dir: runs/x\n",
    "no_tracker/readme.txt": "",
    "a_run/checkpoints/latest_checkpointed_iteration.txt": "3\n",
    "a_run/checkpoints/iter_0000003/.metadata": "",
    "bad_tracker/latest_checkpointed_iteration.txt": "three\n",
    "gone/latest_checkpointed_iteration.txt": "7\n",
    "no_config/latest_checkpointed_iteration.txt": "7\n",
    "no_config/iter_0000007/.metadata": "",
}


def make_folder(folder: Path) -> Path:
    """Write all of `FILES` under `folder`."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("{tmp}", str(folder)), encoding="utf-8")
    (folder / "latin1.yaml").write_bytes(b"preset: tiny # caf\xe9\n")
    return folder
