"""The way of a batch: ids to owners, vectors back, gradients to owners, the step."""
