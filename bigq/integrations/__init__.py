"""Integrations: what accelerate and transformers expect of a model, and their configs. No other code knows these."""
