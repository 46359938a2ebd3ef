"""A model: its modules and tensors, which of its weights are quantized, and how changes of it are undone."""
