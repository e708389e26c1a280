"""Mutants of the family scores."""
