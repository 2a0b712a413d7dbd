"""A fictional world, its documents and questions, and the tiny language model that was pre-trained in it."""
