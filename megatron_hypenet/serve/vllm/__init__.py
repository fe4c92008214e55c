"""HypeNet as a model of vLLM (0.32): `plugin` registers it, `model` is the model, `mixer_*` are its
mixers.

The modelling code that exported folders carry (`export/hf_remote`) is the reference; functions that
do not depend on the engine are taken from it. Shapes here: T tokens of all requests of a step in a
row, n requests, h heads of this rank, g key/value heads of this rank, d head_dim, H hidden_size."""
