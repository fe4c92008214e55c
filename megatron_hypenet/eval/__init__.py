"""Measures of a model: recall of facts by length, loss on held-out text, and figures of both."""
