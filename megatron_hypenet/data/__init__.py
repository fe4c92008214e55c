"""Text to token files to training sequences: preparation, reading, blending with recall documents,
and the resumable position."""
