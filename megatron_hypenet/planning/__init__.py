"""What a run will need, known before it starts: GPU memory, layouts that fit, layers per pipeline
stage, time."""
