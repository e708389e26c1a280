"""Contracts of the family parallel."""
