"""HALO's tasks in order: what they are, what they do, their folder and their report."""
