"""Mutants of the family linear."""
