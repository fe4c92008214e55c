"""A running process watched: what it is doing, whether it still gets further, what was asked of it,
and the fault that ended it."""
