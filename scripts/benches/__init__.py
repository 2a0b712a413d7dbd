"""Side by side with what people would use instead: one bench a file, each a function `run` that yields rows."""
