"""What quantizing changes in a model: its bytes, weights, outputs, perplexity and speed."""
