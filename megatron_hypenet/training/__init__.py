"""How many steps are done and what is told of them: the loop, its micro-batches, saves and
metrics."""
