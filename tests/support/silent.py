"""A search engine that never finds anything."""

from zs_lightning.search import SearchEngine
from zs_lightning.types import SearchResult


class Silent(SearchEngine):
    name = "silent"

    def __init__(self):
        self.requests = []

    def submit(self, requests):
        self.requests += requests

    def poll(self):
        requests, self.requests = self.requests, []
        return [SearchResult(key=request.key) for request in requests]
