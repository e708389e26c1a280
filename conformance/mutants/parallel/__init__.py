"""Mutants of the family parallel."""
