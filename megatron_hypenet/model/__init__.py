"""HypeNet and its teacher as Megatron-core modules: mixers, layer specs, the model, and
attention-to-RNN weight transfer."""
