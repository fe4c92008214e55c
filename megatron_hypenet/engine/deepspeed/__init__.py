"""The only package that imports DeepSpeed: its configuration, one training step, and access to
weights and optimizer state by parameter."""
