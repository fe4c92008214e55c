"""Hugging Face folders <-> our checkpoints: one name table (`mapping`), one config table
(`hf_config`), both directions, and the proof."""
