"""What a plan does to a model."""
