"""What production gets: a chosen plan with its weights, proven, in formats that servers read."""
