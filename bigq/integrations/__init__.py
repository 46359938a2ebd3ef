"""Integrations: bigq behind the entry points of other libraries. Each file is imported by its user, and by no other."""
