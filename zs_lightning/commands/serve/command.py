"""Serves a search engine over HTTP with the API of Search-R1's retriever: POST /retrieve."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zs_lightning.configuration.arguments import CommandParser, build, search_options, split
from zs_lightning.errors import UserError

HOST, PORT = "127.0.0.1", 8000
SEARCH_HELP = """search engine:
  --search CLASS            BM25Search (of a miniature world if it is given no corpus) or DenseSearch
  --search.OPTION VALUE     such as --search.corpus notes/; for all of them: --search.help CLASS

A file for --config holds the same: search (class_path and init_args), host and port.

examples:
  python -m zs_lightning serve --search BM25Search --search.corpus wiki.jsonl
  curl -H 'Content-Type: application/json' http://127.0.0.1:8000/retrieve \\
       -d '{"queries": ["red harbor"], "topk": 3, "return_scores": true}'
"""


def parse(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and those of the search engine."""
    parser = CommandParser("serve", __doc__, SEARCH_HELP)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with search, host and port")
    parser.add_argument("--host", help=f"address to listen at ({HOST}); whoever reaches it can search")
    parser.add_argument("--port", type=int, help=f"port to listen at ({PORT}); 0 takes a free one")
    own, search = split(args)
    return parser.parse_args(own), search


def read_config(file: Path) -> dict[str, Any]:
    """What stands in the file. Raises UserError if it holds other things than search, host and port."""
    import yaml

    from zs_lightning.configuration.paths import check_config_file

    check_config_file(file)
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    if unknown := sorted(map(str, set(config) - {"schema", "search", "host", "port"})):
        raise UserError(f"--config: unknown option {unknown[0]} in {file}; expected search, host and port")
    if not isinstance(config.get("host", HOST), str) or type(config.get("port", PORT)) is not int:
        raise UserError(f"--config: expected a text as host and a whole number as port in {file}")
    return config


def main(args: Sequence[str]) -> None:
    """Runs the command until Ctrl-C; `args` is what stands after its name."""
    options, search = parse(args)
    config = read_config(options.config) if options.config else {}
    from zs_lightning.commands.serve.server import Retriever
    from zs_lightning.configuration.lightning_cli import quiet
    from zs_lightning.search.base import SearchEngine
    from zs_lightning.search.corpus import LocalSearch

    quiet()
    named = config.get("search", "BM25Search")
    default = ["--search", named if isinstance(named, str) else json.dumps(named)]
    engine = build(SearchEngine, "search", search_options(search, default))
    if not isinstance(engine, LocalSearch):
        raise UserError(f"search: {type(engine).__name__} ranks no passages; expected BM25Search or DenseSearch")
    engine.setup()
    host = options.host or config.get("host", HOST)
    port = config.get("port", PORT) if options.port is None else options.port
    with Retriever(engine, host, port) as server:
        print(f"{engine.name}: {len(engine.documents)} passages at http://{host}:{server.server_port}/retrieve", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nstopped")
