"""Supervision of a running process: what it is doing, whether it makes progress, requests to save
or stop, and the fault that ended it."""
