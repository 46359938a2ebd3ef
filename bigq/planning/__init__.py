"""What becomes of every tensor of a model, and where: decided before anything is read or changed."""
