"""What the chapters share: softmax, merge, top-k, masks, rotary positions, pooling, GELU."""
