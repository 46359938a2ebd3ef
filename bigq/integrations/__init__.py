"""What other libraries ask of a model: the only place that knows their flags."""
