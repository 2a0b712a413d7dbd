"""The documented JSON of each search provider, as a server of theirs would answer."""

from zs_lightning import search

CANARY = "canary-4f9a0c77/key+x"
KEYED = {
    "SERPAPI_API_KEY": search.SerpAPISearch,
    "SERPER_API_KEY": search.SerperSearch,
    "BRAVE_API_KEY": search.BraveSearch,
    "TAVILY_API_KEY": search.TavilySearch,
}


def mediawiki(asked):
    assert (asked.method, asked.params["action"], asked.params["list"]) == ("GET", "query", "search")
    assert (asked.params["format"], asked.params["formatversion"], asked.params["maxlag"]) == ("json", "2", "5")
    query = asked.params["srsearch"]
    snippet = f'The <span class="searchmatch">{query}</span> &amp; a &lt;b&gt; of it&#039;s'
    row = {"ns": 0, "title": f"About {query}", "pageid": 1, "snippet": snippet}
    rows = [row] * int(asked.params["srlimit"])
    return {"batchcomplete": True, "continue": {"sroffset": 2}, "query": {"searchinfo": {"totalhits": 9}, "search": rows}}


def searxng(asked):
    assert (asked.method, asked.params["format"]) == ("GET", "json")
    query = asked.params["q"]
    row = {"url": "https://x.example/", "title": f"About {query}", "content": f"a < {query} > b", "engine": "x", "score": 1.0}
    return {"query": query, "number_of_results": 0, "results": [row] * 20, "unresponsive_engines": [["google", "CAPTCHA"]]}


def serpapi(asked):
    assert (asked.method, asked.params["engine"], asked.params["api_key"]) == ("GET", "google", CANARY)
    query = asked.params["q"]
    row = {"position": 1, "title": f"About {query}", "link": "https://x.example/", "snippet": f"a < {query} > b"}
    return {
        "search_metadata": {"id": "1", "status": "Success"},
        "search_parameters": {"engine": "google", "q": query},
        "organic_results": [row] * int(asked.params["num"]),
    }


def serper(asked):
    assert (asked.method, asked.headers["x-api-key"]) == ("POST", CANARY)
    query = asked.body["q"]
    row = {"title": f"About {query}", "link": "https://x.example/", "snippet": f"a < {query} > b", "position": 1}
    return {"searchParameters": {"q": query, "type": "search"}, "organic": [row] * asked.body["num"], "credits": 1}


def brave(asked):
    assert (asked.method, asked.headers["x-subscription-token"], asked.headers["accept-encoding"]) == ("GET", CANARY, "gzip")
    query = asked.params["q"]
    row = {
        "title": f"About <strong>{query}</strong>",
        "url": "https://x.example/",
        "description": f"a &lt; <strong>{query}</strong> > b",
    }
    return {
        "type": "search",
        "query": {"original": query},
        "web": {"type": "search", "results": [row] * int(asked.params["count"])},
    }


def tavily(asked):
    assert (asked.method, asked.headers["authorization"]) == ("POST", f"Bearer {CANARY}")
    query = asked.body["query"]
    row = {
        "title": f"About {query}",
        "url": "https://x.example/",
        "content": f"a < {query} > b",
        "score": 0.9,
        "raw_content": None,
    }
    return {"query": query, "answer": None, "images": [], "results": [row] * asked.body["max_results"], "response_time": 1.1}


def retrieve(asked):
    assert (asked.method, asked.path, asked.body["return_scores"]) == ("POST", "/search", True)
    row = [{"document": {"id": "7", "contents": f'"About {q}"\na < {q} > b'}, "score": 0.5} for q in asked.body["queries"]]
    return {"result": [row * asked.body["topk"]]}


def zerosearch_wiki(asked):
    assert asked.method == "POST"
    return [{"text": f"a < {asked.body['query']} > b"}] * asked.body["top_k"]


ENGINES = {
    search.MediaWikiSearch: mediawiki,
    search.SearXNGSearch: searxng,
    search.SerpAPISearch: serpapi,
    search.SerperSearch: serper,
    search.BraveSearch: brave,
    search.TavilySearch: tavily,
    search.RetrieveSearch: retrieve,
    search.ZeroSearchWikiSearch: zerosearch_wiki,
}


# A retrieval server for the tests of what all engines share.


def passage(text):
    return {"document": {"id": "1", "contents": f'"About {text}"\nText of {text}.'}, "score": 0.5}


def good(asked):
    return {"result": [[passage(asked.body["queries"][0])]]}


def answering(replies):
    """A server's answers: `replies` by query, and good ones to all others."""
    return lambda asked: replies[q] if (q := asked.body["queries"][0]) in replies else good(asked)


def is_good(result):
    query = result.key
    return [(d.title, d.text) for d in result.documents] == [(f"About {query}", f"Text of {query}.")] and not result.failure
