"""Part: how a pair of query and key is scored, and how scores become weights."""
