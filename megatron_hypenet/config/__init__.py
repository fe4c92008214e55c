"""What a run is made of: frozen, strict pydantic models, the YAML loader, and the rules that span
several fields."""
