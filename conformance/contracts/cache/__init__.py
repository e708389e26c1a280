"""Contracts of the family cache."""
