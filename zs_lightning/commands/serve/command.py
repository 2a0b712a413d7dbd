"""Serves a search engine over HTTP with the API of Search-R1's retriever: POST /retrieve."""

import sys
from collections.abc import Sequence

from zs_lightning.configuration.arguments import CommandParser, instantiate, search_options, split
from zs_lightning.errors import Stopped, UserError

HELP = """search engine:
  --search CLASS            BM25Search (without a corpus of a miniature world) or DenseSearch
  --search.OPTION VALUE     such as --search.corpus notes/; for all of them: --search.help CLASS

examples:
  python -m zs_lightning serve --search BM25Search --search.corpus wiki.jsonl
  curl http://127.0.0.1:8000/retrieve -d '{"queries": ["red harbor"], "return_scores": true}'
"""


def main(args: Sequence[str]) -> None:
    """Runs the command until Ctrl-C; `args` is what stands after its name."""
    parser = CommandParser("serve", __doc__, HELP)
    parser.add_argument("--host", default="127.0.0.1", help="address (127.0.0.1); all who reach it can search")
    parser.add_argument("--port", type=int, default=8000, help="port (8000); 0 takes a free one")
    own, search = split(args)
    options = parser.parse_args(own)
    # Help is there before what follows, which takes seconds to import.
    from zs_lightning.commands.serve.server import Retriever
    from zs_lightning.configuration.lightning_cli import quiet
    from zs_lightning.search import SearchEngine
    from zs_lightning.search.corpus import LocalSearch

    quiet()
    engine = instantiate(SearchEngine, "search", search_options(search, ["--search", "BM25Search"]))
    if not isinstance(engine, LocalSearch):
        raise UserError(f"search: {type(engine).__name__} ranks no passages; take BM25Search")
    engine.setup()
    with Retriever(engine, options.host, options.port) as server:
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"http://{host}:{server.server_port}/retrieve"
        if not server.is_private:
            warning = "WARNING: other machines reach this address; all who do can search and read the texts"
            print(f"{warning}. --host 127.0.0.1 keeps them on this one.", file=sys.stderr)
        try:
            print(f"{engine.name}: {len(engine.documents)} passages at {address}", flush=True)
            server.serve_forever()
        except KeyboardInterrupt as end:
            print("\nstopped", flush=True)
            # Ctrl-C is how it is ended.
            if isinstance(end, Stopped) and end.code != 130:
                raise
