"""Dense retrieval: an encoder of the E5 family (arXiv 2212.03533), an exact index (faiss)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zs_lightning.errors import UserError
from zs_lightning.models.specs import choose_device, read, weights_key
from zs_lightning.search.corpus import CACHE, Hit, LocalSearch, Passages, indexed

MOST_TOKENS = 512
"""A query or a passage is cut here; E5 was trained with so many."""
BATCHES = 64
"""Batches of passages that are in memory at the same time while an index is made."""
INDEX = "passages.faiss"


class Encoder:
    """A frozen sentence embedder with mean pooling: a folder or a hub name, named at `key`. Raises
    UserError if there is none, or it is a model that writes."""

    def __init__(self, path: str, device: str = "auto", key: str = "search.model", batch_size: int = 64) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.tokenizer: Any = read(AutoTokenizer.from_pretrained, path, "encoder", key)
        model: Any = read(AutoModel.from_pretrained, path, "encoder", key)
        if "ForCausalLM" in str(model.config.architectures) or model.config.is_encoder_decoder:
            raise UserError(f"{key}: {path} is a language model that writes; expected an encoder of sentences")
        self.model = model.to(choose_device(device, "search.device")).eval()
        self.batch_size = batch_size
        self.longest = min(MOST_TOKENS, getattr(model.config, "max_position_embeddings", MOST_TOKENS))

    @torch.no_grad()
    def encode(self, kind: str, texts: Sequence[str]) -> Any:
        """Unit vectors of n texts, [n, d] float32: the mean over the tokens' last states. The kind
        is `query` or `passage`, the prefix that E5 was trained with."""
        # Half characters, which a model can write, are no text for a tokenizer.
        prefixed = [f"{kind}: {text}".encode("utf-8", "replace").decode() for text in texts]
        # Texts of like length together, the longest first: each pads its batch to itself.
        order = sorted(range(len(texts)), key=lambda i: -len(prefixed[i]))
        options = {"padding": True, "truncation": True, "max_length": self.longest, "return_tensors": "pt"}
        found = []
        for start in range(0, len(texts), self.batch_size):
            batch = [prefixed[i] for i in order[start : start + self.batch_size]]
            inputs = self.tokenizer(batch, **options).to(self.model.device)
            # A trainer's precision would round vectors as training does.
            with torch.autocast(self.model.device.type, enabled=False):
                states = self.model(**inputs).last_hidden_state.float()
            # Padding must not count, or a text's vector would depend on its batch.
            mask = inputs["attention_mask"][:, :, None]
            mean = (states * mask).sum(1) / mask.sum(1)
            found.append(torch.nn.functional.normalize(mean, dim=-1).cpu().numpy())
        return np.concatenate(found)[np.argsort(order)]


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
        self.encoder = Encoder(self.model, self.device, batch_size=self.batch_size)
        folder = indexed(self.corpus, self.cache, f"dense {weights_key(self.model)}", self._build)
        self.documents = Passages(folder)
        # Mapped into memory: an index of Wikipedia is larger than it.
        self.index = faiss.read_index(str(folder / INDEX), faiss.IO_FLAG_MMAP_IFC)

    def _build(self, folder: Path, passages: Passages) -> None:
        import faiss

        index: Any = None
        # Many batches at a time, whose texts are put in order of length.
        step = BATCHES * self.batch_size
        for start in range(0, len(passages), step):
            numbers = range(start, min(start + step, len(passages)))
            vectors = self.encoder.encode("passage", [passages[number].contents for number in numbers])
            # Of unit vectors the inner product is the cosine.
            index = index or faiss.IndexFlatIP(vectors.shape[1])
            index.add(vectors)
        faiss.write_index(index, str(folder / INDEX))

    def rank(self, queries: Sequence[str], count: int) -> list[list[Hit]]:
        self.setup()
        vectors = self.encoder.encode("query", queries)
        scores, numbers = self.index.search(vectors, min(count, len(self.documents)))
        rows = zip(numbers.tolist(), scores.tolist(), strict=True)
        return [[Hit(self.documents[i], score) for i, score in zip(*row, strict=True)] for row in rows]
