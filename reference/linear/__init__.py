"""Part: attention without softmax, as a state that is carried along the sequence."""
