"""Where a run reports its quantities: TensorBoard always, Weights & Biases and MLflow on request.
Each library is imported in its own file only."""
