"""Makes the base model that ships with the miniature."""
