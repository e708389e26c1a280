"""Contracts of the family heads."""
