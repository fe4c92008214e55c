"""Pure tensor functions: definitions in plain torch, and faster forms that are tested against them.
They use no module state and no process groups."""
