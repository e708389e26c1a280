"""What a decoder keeps of its keys and values."""
