"""Estimates of what a run will need, before it starts: GPU memory, layouts that fit, layers per
pipeline stage, time."""
