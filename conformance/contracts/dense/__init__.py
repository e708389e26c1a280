"""Contracts of chapter zero."""
