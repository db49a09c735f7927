"""A dense checkpoint becomes a fine-grained mixture of experts (2410.07524).

scheme.py   which channels of an MLP each expert takes, and the scale; what fits and what does not
request.py  the config of the MoE model, of what was asked for
tensors.py  the MoE model's tensors, made of a dense checkpoint as they are asked for
write.py    into a checkpoint, streamed
report.py   what would be done, in a table
"""
