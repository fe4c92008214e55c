"""HALO's tasks in order: the table, the actions, the run folder and the report."""
