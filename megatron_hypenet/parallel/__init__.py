"""Everything that knows about ranks: process groups, sharded norms and losses, and Megatron-core on
machines without CUDA."""
