"""Contracts of the family linear."""
