"""HypeNet with HALO on Megatron-core and DeepSpeed: distil a softmax-attention teacher into a
long-context hybrid model."""

import warnings

__version__ = "0.1.0"

# Megatron-core says at import that faster optional libraries are absent; `hypenet doctor` is where
# a user reads that.
warnings.filterwarnings(
    "ignore", message="Transformer Engine and Apex are not installed", category=UserWarning
)
warnings.filterwarnings("ignore", message="Apex is not installed", category=UserWarning)
warnings.filterwarnings("ignore", message="full scope is deprecated", category=UserWarning)
