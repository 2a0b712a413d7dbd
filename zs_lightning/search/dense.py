"""Dense retrieval: an encoder of the E5 family (arXiv 2212.03533) and an exact index over inner products (faiss)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zs_lightning.errors import UserError
from zs_lightning.models.loading import choose_device, resolve_path
from zs_lightning.search.corpus import CACHE, Passages, indexed
from zs_lightning.search.local import Hit, LocalSearch

MOST_TOKENS = 512
"""Of a query or a passage; what E5 was trained with."""
INDEX = "passages.faiss"


class DenseSearch(LocalSearch):
    """Passages whose embeddings are nearest to the query's. Needs the extra `dense`.

    Args:
        corpus: a folder of texts (.txt, .md, .markdown, .rst; cut into passages of about 100 words) and of .jsonl files
            ({id, contents} or {id, title, text} in each line, a passage each), or one such file.
        model: the encoder: a folder or a hub name, of the E5 family or of another with its prefixes and mean pooling.
        count: documents per search.
        batch_size: passages encoded at the same time.
        device: cpu, cuda, cuda:1 …; auto takes the first CUDA card if there is one.
        cache: folder that keeps the index of a corpus until the corpus changes.
    """

    name = "dense"

    def __init__(
        self,
        corpus: str,
        model: str = "intfloat/e5-base-v2",
        count: int = 3,
        batch_size: int = 64,
        device: str = "auto",
        cache: str = CACHE,
    ) -> None:
        super().__init__(count)
        if batch_size < 1:
            raise UserError(f"search.batch_size: expected 1 or more; got {batch_size}")
        self.corpus, self.model, self.batch_size, self.device, self.cache = corpus, model, batch_size, device, cache
        self.encoder: Encoder | None = None
        self.index: Any = None

    def setup(self) -> None:
        if self.index is not None:
            return
        try:
            import faiss
        except ImportError as error:
            raise UserError(
                "search: DenseSearch needs the package faiss; install it with pip install 'zs-lightning[dense]'"
            ) from error
        self.encoder = Encoder(self.model, self.device)
        folder = indexed(self.corpus, self.cache, f"dense {weights_key(self.model)}", self._build)
        self.documents = Passages(folder)
        self.index = faiss.read_index(str(folder / INDEX), faiss.IO_FLAG_MMAP_IFC)

    def _build(self, folder: Path, passages: Passages) -> None:
        import faiss

        assert self.encoder is not None
        index: Any = None
        for start in range(0, len(passages), self.batch_size):
            batch = passages[start : start + self.batch_size]
            vectors = self.encoder.encode("passage", [passage.contents for passage in batch])
            index = index or faiss.IndexFlatIP(vectors.shape[1])
            index.add(vectors)
        faiss.write_index(index, str(folder / INDEX))

    def rank(self, queries: Sequence[str], count: int) -> list[list[Hit]]:
        self.setup()
        assert self.encoder is not None
        found: list[list[Hit]] = []
        for start in range(0, len(queries), self.batch_size):
            vectors = self.encoder.encode("query", queries[start : start + self.batch_size])
            scores, numbers = self.index.search(vectors, min(count, len(self.documents)))
            pairs = zip(numbers.tolist(), scores.tolist(), strict=True)
            found += [[Hit(self.documents[i], score) for i, score in zip(*row, strict=True)] for row in pairs]
        return found


class Encoder:
    """Texts to unit vectors: a prefix that says what the text is, the mean over the tokens' last states, normalised.

    Args:
        path: a folder or a hub name.
        device: as in DenseSearch.

    Raises:
        UserError: nothing to load there.
    """

    def __init__(self, path: str, device: str) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        resolved, self.device = resolve_path(path), choose_device(device)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(resolved)
            model: Any = AutoModel.from_pretrained(resolved)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"search.model: no encoder could be loaded from {path}: {reason}") from error
        self.model = model.to(self.device).eval()
        self.length = min(MOST_TOKENS, getattr(model.config, "max_position_embeddings", MOST_TOKENS))

    @torch.no_grad()
    def encode(self, kind: str, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[n, d] float32. `kind` is `query` or `passage`."""
        options = {"padding": True, "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        inputs = self.tokenizer([f"{kind}: {text}" for text in texts], **options).to(self.device)
        states = self.model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][:, :, None]
        mean = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()


def weights_key(path: str) -> str:
    """What an encoder's embeddings depend on: its name or, of a folder, its files with their sizes and times."""
    folder = Path(resolve_path(path))
    if not folder.is_dir():
        return path
    stamps = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir()) if f.is_file()]
    return f"{folder.resolve()} {stamps}"
