"""Pallas GPU kernels for ragged attention: arrays in, arrays out."""
