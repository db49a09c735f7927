"""From a trained model to a smaller one.

request.py  what is asked of `compress prune`, and every reason against it
sizes.py    the sizes of each layer of the smaller model, and its config
score.py    what is asked of `compress score`: a model in a layout, over samples
activations.py  hooks on its layers
scores.py   importance by layer and channel: the file of it
choose.py   which channels, heads and experts stay
axes.py     which of them each dimension of each tensor runs over
tensors.py  the smaller model's tensors, read from the parent's checkpoint as they are asked for
write.py    into a checkpoint, streamed
picture.py  importance by layer
report.py   what would be done, in a table
"""
