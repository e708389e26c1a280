"""Contracts of the family patterns."""
