"""Distributed checkpoints (torch_dist) as folders and files: no model, no process group.

files.py          a run's folders, the tracker, how a checkpoint appears whole
reader.py         any rows of any tensor; source_model.py, which model a checkpoint holds
writer.py         tensors part by part
stored_tensor.py  one tensor in a file, as it is read; tensor_item.py, as it is written
inert_pickle.py   pickles that are read and not run
"""
