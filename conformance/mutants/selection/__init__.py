"""Mutants of the family selection."""
