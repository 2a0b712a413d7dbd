"""Search engines behind one protocol: a request in, documents (or a failure) out."""

from zs_lightning.search.base import SearchEngine
from zs_lightning.search.bm25 import BM25Search
from zs_lightning.search.dense import DenseSearch
from zs_lightning.search.retrieval import RetrieveSearch, ZeroSearchWikiSearch
from zs_lightning.search.served import ServedSimulatorSearch
from zs_lightning.search.simulator import SimulatorSearch
from zs_lightning.search.web import BraveSearch, MediaWikiSearch, SearXNGSearch, SerpAPISearch, SerperSearch, TavilySearch

__all__ = [
    "BM25Search",
    "BraveSearch",
    "DenseSearch",
    "MediaWikiSearch",
    "RetrieveSearch",
    "SearXNGSearch",
    "SearchEngine",
    "SerpAPISearch",
    "SerperSearch",
    "ServedSimulatorSearch",
    "SimulatorSearch",
    "TavilySearch",
    "ZeroSearchWikiSearch",
]
