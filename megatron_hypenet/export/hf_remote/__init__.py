"""Modelling code that an exported HypeNet folder carries for `trust_remote_code=True`. It imports
only torch and transformers."""
