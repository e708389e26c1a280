"""Part: choose where to look, then attend."""
