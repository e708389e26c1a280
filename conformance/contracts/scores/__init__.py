"""Contracts of the family scores."""
