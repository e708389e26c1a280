"""Mechanisms of the family patterns: static masks as plans for the flash engine."""
