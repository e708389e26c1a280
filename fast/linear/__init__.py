"""Linear attention on the scan engine: running states instead of caches."""
