"""A fictional world, its documents and questions, and a tiny language model that knows it."""
