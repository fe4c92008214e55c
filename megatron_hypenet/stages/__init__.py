"""HALO's stages: what trains, what the loss is, and what is handed on; never how to train.
Submodules are imported by name."""
