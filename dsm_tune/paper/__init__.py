"""The DSM paper's tables and figures, redone: what is printed, beside what is computed here."""
