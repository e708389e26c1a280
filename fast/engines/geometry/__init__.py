"""Plane geometry over a batch of point sets, on the CPU: hulls, tours and polygons."""
