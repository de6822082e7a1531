"""What production gets."""
