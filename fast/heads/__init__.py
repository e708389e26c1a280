"""Mechanisms of the family heads: head counts and head choice on the flash and decode engines."""
