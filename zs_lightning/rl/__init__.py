"""Pure functions of tensors and floats: curriculum, rewards, advantages, losses."""
