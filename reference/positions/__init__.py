"""Part: where tokens stand, and how attention learns of it."""
