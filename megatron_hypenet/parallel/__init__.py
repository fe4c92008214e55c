"""Everything that knows about ranks: process groups, sharded norms and losses, and Megatron-core on machines without CUDA."""

import warnings

# Megatron-core says at import that faster optional libraries are absent; `hypenet doctor` is where a user reads that.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed", category=UserWarning)
warnings.filterwarnings("ignore", message="full scope is deprecated", category=UserWarning)
