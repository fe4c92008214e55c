"""HALO's stages: what trains, what the loss is, and what is saved for the next stage; not how to
train. Submodules are imported by name."""
