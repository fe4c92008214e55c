"""How one optimizer step is computed: DeepSpeed's engine, CUDA graphs, AdamW."""
