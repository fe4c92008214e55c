"""HypeNet with HALO on Megatron-core and DeepSpeed: distil a softmax-attention teacher into a long-context hybrid model."""

__version__ = "0.1.0"
