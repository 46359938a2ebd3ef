"""Kernels of NF4 and FP4: 4-bit codes with a scale for each block of a row."""
