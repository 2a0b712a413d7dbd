"""A search engine of this machine behind HTTP."""
