"""Checkpoints: one folder per save, readable on any parallel layout.

`save.write_weights` and `load.read_weights` need one process and no torch.distributed;
`load.load_model` fills a (sharded) model; `save.begin_save` and `load.load_training` keep what a
run needs to continue bit for bit. `format` names every file of a folder.
"""
