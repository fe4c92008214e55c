"""Random damage to every kind of file that others made: what it may look like, who reads it, and
how the outcome is judged."""
