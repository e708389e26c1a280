"""Mutants of the family positions."""
