"""ZeroSearch on one workstation: learn to search without a search engine (arXiv 2505.04588)."""

__version__ = "0.1.0"
