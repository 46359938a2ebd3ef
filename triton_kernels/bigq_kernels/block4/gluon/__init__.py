"""Kernels in Gluon, which says where every byte lies and what runs beside what; each has a Triton twin."""
