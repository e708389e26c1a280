"""Mutants of the family heads."""
