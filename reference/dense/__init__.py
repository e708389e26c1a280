"""Part zero: dense softmax attention, the chapter every other one departs from."""
