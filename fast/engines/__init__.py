"""The few kernels that do the work; a mechanism is a plan for one of them."""
