"""Contracts of the family positions."""
