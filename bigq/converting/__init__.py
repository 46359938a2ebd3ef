"""Converting: a checkpoint becomes a folder of quantized weights, a file at a time, and never a model in memory."""
