"""Dry runs: what a load would do, what files hold and what memory a model needs, from headers and configs alone."""
