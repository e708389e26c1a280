"""Part: static masks, and the models built on them."""
