"""What is learned: from a batch and a model to a summed loss."""
