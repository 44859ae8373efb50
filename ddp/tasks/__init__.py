"""What can be trained: each task brings a model, its data, a loss and metrics."""
