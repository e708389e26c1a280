"""Part: what a decoder keeps of the past."""
