"""Saving a quantized model: its tensors in a layout, in files, and a config.json that says what they are."""
