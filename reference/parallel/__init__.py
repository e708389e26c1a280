"""Part: one attention computed by many workers."""
