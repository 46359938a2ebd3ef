"""Carrying out a plan: read, quantize, place, commit, report."""
