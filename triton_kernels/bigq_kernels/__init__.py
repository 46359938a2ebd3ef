"""Triton kernels of bigq: quantize, dequantize and multiply NF4, FP4 and int8 weights; knows torch and triton only."""
