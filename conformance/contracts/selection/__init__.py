"""Contracts of the family selection."""
