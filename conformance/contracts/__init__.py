"""What is special about each operation, found by the mechanism's family and name."""
