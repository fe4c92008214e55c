"""Pure tensor functions: definitions in plain torch, and faster forms that answer to them. No
module state, no process groups."""
