"""Kernels on the Pallas Mosaic GPU backend: Hopper and Blackwell."""
