"""Mutants of the family cache."""
