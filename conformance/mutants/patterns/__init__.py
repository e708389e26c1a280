"""Mutants of the family patterns."""
