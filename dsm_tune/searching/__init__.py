"""Which plan to try next."""
