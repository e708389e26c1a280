"""Mutants of chapter zero."""
