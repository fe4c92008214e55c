"""The training loop, what it calls, and HALO's steps around it."""
