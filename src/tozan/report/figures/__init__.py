"""The figures, by subject: one function each, which returns None where it finds no data."""
