"""Everything that depends on ranks: process groups, sharded norms and losses, and Megatron-core on
machines without CUDA."""
