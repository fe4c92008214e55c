"""The configuration of a run: frozen, strict pydantic models, the YAML loader, and the rules that
span several fields."""
