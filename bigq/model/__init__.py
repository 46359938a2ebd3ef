"""A model as it stands: its modules and tensors, which weights are quantized, and how a change of it is undone."""
