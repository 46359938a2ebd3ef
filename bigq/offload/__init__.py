"""Tensors that are stored on the CPU or the disk, and how a module gets them in time."""
