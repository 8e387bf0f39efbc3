"""Models that the training job knows."""
