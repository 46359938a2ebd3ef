"""Calibration: what a float model's weights meet, measured by running the model on a few batches."""
