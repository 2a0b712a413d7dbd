"""Real search engines on the network: one small class for each provider's documented JSON.

A configuration names the class and, of providers with a key, the environment variable that holds
it:

    search:
      class_path: SerperSearch
      init_args: {api_key_env: SERPER_API_KEY, http: {cache: google.sqlite}}
"""

from dataclasses import dataclass
from typing import Any

from zs_lightning.errors import UserError
from zs_lightning.search.http import Busy, Call, Failed, Found, HttpSpec, field, titled, unmarked
from zs_lightning.search.remote import RemoteSearch

PASSING = ("maxlag", "ratelimited", "readonly")
"""Errors of a wiki that pass."""


@dataclass(eq=False, repr=False)
class MediaWikiSearch(RemoteSearch):
    """Full-text search of Wikipedia or of another wiki (MediaWiki's API:Search). Needs no key.

    Wikimedia asks for one request after another and for an address to write to.

    Args:
        endpoint: the wiki's api.php.
        count: documents per search: titles with a snippet of the text.
        http: how the server is asked.
        contact: e-mail address or web page of yours, sent along.
    """

    name = "mediawiki"
    most_count = 500
    longest_query = 300
    refused = "set search.contact to your address, and search.http.concurrency to 1"

    endpoint: str = "https://en.wikipedia.org/w/api.php"
    contact: str = ""
    http: HttpSpec = HttpSpec(concurrency=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.contact.isascii() or not self.contact.isprintable():
            wanted = "an e-mail address or the address of a web page"
            raise UserError(f"search.contact: expected {wanted}; got {self.contact!r}")
        self.agent = f" ({self.contact})" if self.contact else ""

    def call(self, query: str) -> Call:
        params = {"action": "query", "list": "search", "srsearch": query, "srlimit": str(self.count)}
        # With maxlag a wiki that is busy says so instead of making its trouble worse.
        params |= {"srprop": "snippet", "format": "json", "formatversion": "2", "maxlag": "5"}
        return Call(params)

    def parse(self, answer: Any) -> Found:
        error = answer.get("error") if isinstance(answer, dict) else None
        if isinstance(error, dict):
            code = str(error.get("code"))[:80]
            reason = f"the wiki reports {code}: {str(error.get('info', ''))[:160]}"
            passes = code in PASSING or code.startswith("internal_api_error")
            raise Busy(reason) if passes else Failed(reason)
        return titled(field(answer, "query", "search"), "snippet", unmarked)


@dataclass(eq=False, repr=False)
class SearXNGSearch(RemoteSearch):
    """A SearXNG server of your own. Its settings.yml must list `json` under search.formats."""

    name = "searxng"
    refused = "let SearXNG's settings.yml list json under search.formats"

    endpoint: str = "http://127.0.0.1:8080/search"
    http: HttpSpec = HttpSpec(concurrency=4)

    def call(self, query: str) -> Call:
        return Call({"q": query, "format": "json"})

    def parse(self, answer: Any) -> Found:
        found = titled(field(answer, "results"), "content")
        # Blocked by all the engines that it asks, it answers with an empty list.
        if not any(found) and (silent := answer.get("unresponsive_engines")):
            raise Failed(f"the engines behind SearXNG do not respond: {str(silent)[:160]}")
        return found


@dataclass(eq=False, repr=False)
class SerpAPISearch(RemoteSearch):
    """Google by SerpApi, the engine of the paper (SerpApi's Google Search API). Needs a key."""

    name = "serpapi"

    endpoint: str = "https://serpapi.com/search.json"
    api_key_env: str = "SERPAPI_API_KEY"

    def call(self, query: str) -> Call:
        # The provider wants its key among the parameters, which are therefore never shown.
        params = {"engine": "google", "q": query, "num": str(self.count), "api_key": self.key}
        return Call(params)

    def parse(self, answer: Any) -> Found:
        if isinstance(answer, dict) and "organic_results" not in answer:
            # A search without results has an `error` too, but counts as a success.
            if field(answer, "search_metadata", "status") == "Success":
                return []
            raise Failed(f"the provider reports: {str(answer.get('error'))[:160]}")
        return titled(field(answer, "organic_results"), "snippet")


@dataclass(eq=False, repr=False)
class SerperSearch(RemoteSearch):
    """Google by Serper (serper.dev). Needs a key."""

    name = "serper"
    results = ("organic",)
    text_key = "snippet"

    endpoint: str = "https://google.serper.dev/search"
    api_key_env: str = "SERPER_API_KEY"

    def call(self, query: str) -> Call:
        return Call(json={"q": query, "num": self.count}, headers={"X-API-KEY": self.key})


@dataclass(eq=False, repr=False)
class BraveSearch(RemoteSearch):
    """Brave's index (Brave Web Search API). Needs a key; cheaper plans allow a request a second."""

    name = "brave"
    most_count = 20
    longest_query = 400
    most_words = 50

    endpoint: str = "https://api.search.brave.com/res/v1/web/search"
    api_key_env: str = "BRAVE_API_KEY"
    http: HttpSpec = HttpSpec(concurrency=1)

    def call(self, query: str) -> Call:
        params = {"q": query, "count": str(self.count)}
        # Only pages, and no marks in them.
        params |= {"result_filter": "web", "text_decorations": "false"}
        return Call(params, headers={"X-Subscription-Token": self.key})

    def parse(self, answer: Any) -> Found:
        # A search that found nothing has no `web`.
        if isinstance(answer, dict) and "web" not in answer and answer.get("type") == "search":
            return []
        return titled(field(answer, "web", "results"), "description", unmarked)


@dataclass(eq=False, repr=False)
class TavilySearch(RemoteSearch):
    """Tavily's search for language models (Tavily Search API). Needs a key."""

    name = "tavily"
    results = ("results",)
    text_key = "content"
    most_count = 20
    longest_query = 400

    endpoint: str = "https://api.tavily.com/search"
    api_key_env: str = "TAVILY_API_KEY"
    http: HttpSpec = HttpSpec(concurrency=4)

    def call(self, query: str) -> Call:
        body = {"query": query, "max_results": self.count}
        return Call(json=body, headers={"Authorization": f"Bearer {self.key}"})
