"""The generator of the documentation's derived pages; `docs/generate.py` runs it."""
