"""A quantized weight: how it is stored, what reading and writing it does, and the modules that hold it."""
