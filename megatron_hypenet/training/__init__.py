"""How many optimizer steps a stage takes and what is reported of them: the loop, its micro-batches,
saves and metrics."""
