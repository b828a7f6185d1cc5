"""Kernels on the Pallas Triton backend: every NVIDIA GPU from Ampere on."""
