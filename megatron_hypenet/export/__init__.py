"""Conversion between Hugging Face folders and checkpoints in both directions, by one table of names
(`mapping`) and one of config keys (`hf_config`), and its verification."""
