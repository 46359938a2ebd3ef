"""Interop: what accelerate and transformers expect of a model, and their configs. No other layer below knows them."""
