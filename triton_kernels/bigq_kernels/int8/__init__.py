"""Kernels of LLM.int8(): one scale a row, and outlier columns in the dtype of the activations."""
