"""One attention on many workers."""
