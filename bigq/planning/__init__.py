"""Planning: what becomes of every tensor of a model and where it is stored, before anything is read or changed."""
