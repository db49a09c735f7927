"""A folder of files that the wrong configs name: good ones, halves, and broken ones."""

from pathlib import Path

FILES = {
    "good.bin": "",
    "good.idx": "",
    "half.bin": "",
    "tokenizer.model": "",
    "not_a_mapping.yaml": "- model\n- data\n",
    "syntax.yaml": "model:\n  hidden_size: [64\n",
    "twice.yaml": "preset: tiny\nmodel:\n  hidden_size: 64\n  hidden_size: 128\n",
    "tabs.yaml": "model:\n\thidden_size: 64\n",
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
        path.write_text(text, encoding="utf-8")
    (folder / "latin1.yaml").write_bytes(b"preset: tiny # caf\xe9\n")
    return folder
