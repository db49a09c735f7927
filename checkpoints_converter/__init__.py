"""Checkpoints to and from Hugging Face's folders: streamed, without a model or a process group.

registry.py          which families there are
nemotron_h.py, ...   a family: its config.json beside our model section, its table of tensors
weights.py           the kinds of rows that such a table is made of
safetensors_files.py reads and writes safetensors
export.py            to Hugging Face; importing.py, from it
"""
