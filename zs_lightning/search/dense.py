"""Dense retrieval: an encoder of the E5 family (arXiv 2212.03533), an exact index (faiss)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zs_lightning.errors import UserError
from zs_lightning.models.specs import choose_device, resolve_path, weights_key
from zs_lightning.search.corpus import CACHE, Hit, LocalSearch, Passages, indexed

MOST_TOKENS = 512
"""A query or a passage is cut here; E5 was trained with so many."""
INDEX = "passages.faiss"


@dataclass(eq=False, repr=False, kw_only=True)
class DenseSearch(LocalSearch):
    """Passages whose embeddings are nearest to the query's. Needs the extra `dense`.

    Args:
        corpus: a folder of texts (.txt, .md, .markdown, .rst; cut into passages of about 100 words)
            and of .jsonl files ({id, contents} or {id, title, text} in each line, a passage each),
            or one such file.
        model: the encoder: a folder or a hub name, of the E5 family or of another with its prefixes
            and mean pooling.
        count: documents per search.
        batch_size: passages encoded at the same time.
        device: cpu, cuda, cuda:1 …; auto takes the first CUDA card if there is one.
        cache: folder that keeps the index of a corpus until the corpus changes.
    """

    name = "dense"

    corpus: str
    model: str = "intfloat/e5-base-v2"
    batch_size: int = 64
    device: str = "auto"
    cache: str = CACHE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise UserError(f"search.batch_size: expected 1 or more; got {self.batch_size}")
        self.index: Any = None

    def setup(self) -> None:
        if self.index is not None:
            return
        try:
            import faiss
        except ImportError as error:
            to = "install it with pip install 'zs-lightning[dense]'"
            raise UserError(f"search: DenseSearch needs the package faiss; {to}") from error
        self.load_encoder()
        folder = indexed(self.corpus, self.cache, f"dense {weights_key(self.model)}", self._build)
        self.documents = Passages(folder)
        # Mapped into memory: an index of Wikipedia is larger than it.
        self.index = faiss.read_index(str(folder / INDEX), faiss.IO_FLAG_MMAP_IFC)

    def load_encoder(self) -> None:
        """Loads what `encode` needs, and no index."""
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        path = resolve_path(self.model, "search.model")
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
            encoder: Any = AutoModel.from_pretrained(path)
        except OSError as error:
            reason = f"no encoder could be loaded from {self.model}: {str(error).splitlines()[0]}"
            raise UserError(f"search.model: {reason}") from error
        self.encoder = encoder.to(choose_device(self.device, "search.device")).eval()
        self.longest = min(MOST_TOKENS, getattr(encoder.config, "max_position_embeddings", MOST_TOKENS))

    def _build(self, folder: Path, passages: Passages) -> None:
        import faiss

        index: Any = None
        for start in range(0, len(passages), self.batch_size):
            numbers = range(start, min(start + self.batch_size, len(passages)))
            vectors = self.encode("passage", [passages[number].contents for number in numbers])
            # Of unit vectors the inner product is the cosine.
            index = index or faiss.IndexFlatIP(vectors.shape[1])
            index.add(vectors)
        faiss.write_index(index, str(folder / INDEX))

    def rank(self, queries: Sequence[str], count: int) -> list[list[Hit]]:
        self.setup()
        vectors = self.encode("query", queries)
        scores, numbers = self.index.search(vectors, min(count, len(self.documents)))
        found: list[list[Hit]] = []
        for row in zip(numbers.tolist(), scores.tolist(), strict=True):
            found.append([Hit(self.documents[i], score) for i, score in zip(*row, strict=True)])
        return found

    @torch.no_grad()
    def encode(self, kind: str, texts: Sequence[str]) -> Any:
        """Unit vectors of n texts, [n, d] float32: the mean over the tokens' last states.

        Args:
            kind: `query` or `passage`; E5 was trained with this prefix.
        """
        options = {"padding": True, "truncation": True, "max_length": self.longest}
        prefixed = [f"{kind}: {text}" for text in texts]
        inputs = self.tokenizer(prefixed, return_tensors="pt", **options).to(self.encoder.device)
        states = self.encoder(**inputs).last_hidden_state.float()
        # Padding must not count, or a text's vector would depend on its batch.
        mask = inputs["attention_mask"][:, :, None]
        mean = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
