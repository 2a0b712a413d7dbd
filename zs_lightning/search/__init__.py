"""Search engines behind one protocol: a request in, documents (or a failure) out."""

from zs_lightning.search.base import SearchEngine
from zs_lightning.search.bm25 import BM25Search
from zs_lightning.search.simulator import SimulatorSearch

__all__ = ["BM25Search", "SearchEngine", "SimulatorSearch"]
