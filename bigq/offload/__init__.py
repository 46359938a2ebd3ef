"""Tensors that rest on the CPU or the disk, and how they come to a module in time."""
