"""Part: how heads share keys and values, and how they mix."""
