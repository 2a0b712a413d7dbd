"""Dense retrieval with a tiny random encoder, against plain numpy."""

import json
import sys

import numpy as np
import pytest
import torch
from transformers import BertModel, PreTrainedTokenizerFast

from support.encoders import make_encoder
from zs_lightning.search import DenseSearch
from zs_lightning.search.dense import Encoder

WORDS = "query passage : red blue harbor tower sea novel by the of a author river ship gold".split()
TEXTS = ["red harbor", "the author of the blue tower", "sea", "a novel by the river", "gold ship of the sea red", "blue blue"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoder"), WORDS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    rows = [{"id": f"d{i}", "title": "The Red" if i == 1 else "", "text": text} for i, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dense(corpus, encoder, folder, **options):
    engine = DenseSearch(corpus=str(corpus), model=encoder, device="cpu", cache=str(folder), **options)
    engine.setup()
    return engine


def slowly(encoder, kind, text):
    """One text alone through the model, tokens averaged in numpy float64."""
    tokenizer, model = PreTrainedTokenizerFast.from_pretrained(encoder), BertModel.from_pretrained(encoder).eval()
    ids = tokenizer.convert_tokens_to_ids([*["[CLS]", *f"{kind} : {text}".split()][:15], "[SEP]"])
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids])).last_hidden_state[0].double().numpy()
    mean = np.mean(states, axis=0)
    return mean / np.sqrt((mean**2).sum())


def test_scores_are_those_of_a_slow_reference(corpus, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("zs_lightning.search.dense.BATCHES", 2)  # The index is made of four passages and two.
    engine = dense(corpus, encoder, tmp_path, batch_size=2)
    contents = [p.contents for p in engine.documents]
    assert contents[1] == '"The Red"\nthe author of the blue tower'
    passages = [slowly(encoder, "passage", text.replace('"', " [UNK] ").replace("The Red", "[UNK] [UNK]")) for text in contents]
    queries = ["red harbor", "novel", "the sea " * 12, "", "blue tower author", "gold"]
    for query, hits in zip(queries, engine.rank(queries, 4), strict=True):
        wanted = np.array(passages) @ slowly(encoder, "query", query)
        order = np.argsort(-wanted)[:4]
        assert [hit.passage.id for hit in hits] == [f"d{i}" for i in order]
        assert [hit.score for hit in hits] == pytest.approx(wanted[order], abs=1e-5)


def test_texts_are_padded_to_their_like_and_keep_their_places(encoder):
    texts = ["sea", "the red ship of the gold river by", "blue", "a novel by the author of the tower", "", "gold", "red sea"]
    model = Encoder(encoder, "cpu", batch_size=3)
    shapes = []
    hook = lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape))  # noqa: E731
    model.model.register_forward_pre_hook(hook, with_kwargs=True)
    vectors = model.encode("passage", texts)
    np.testing.assert_allclose(vectors, [slowly(encoder, "passage", text) for text in texts], atol=1e-5)
    # Words of the longest text in each batch, with the prefix and two marks: 8, 1 and none.
    assert shapes == [(3, 12), (3, 5), (1, 4)]


def test_more_passages_than_there_are_cannot_be_found(corpus, encoder, tmp_path):
    engine = dense(corpus, encoder, tmp_path)
    for hits in engine.rank(["red harbor", "", "zzyzx"], 1000):
        assert sorted(hit.passage.id for hit in hits) == sorted(passage.id for passage in engine.documents)


def test_an_index_from_disk_is_the_same_and_the_encoder_is_part_of_its_key(corpus, encoder, tmp_path):
    cache = tmp_path / "cache"
    first = dense(corpus, encoder, cache, batch_size=2)
    made = [p.stat().st_mtime_ns for p in cache.glob("*/*")]
    again = dense(corpus, encoder, cache, batch_size=2)
    assert again.rank(TEXTS, 3) == first.rank(TEXTS, 3)
    assert [p.stat().st_mtime_ns for p in cache.glob("*/*")] == made
    assert len(made) == 4  # passages, their offsets, the index, and the sizes of the three.
    other = tmp_path / "other"
    model = BertModel.from_pretrained(encoder)
    model.embeddings.word_embeddings.weight.data.neg_()
    model.save_pretrained(other)
    PreTrainedTokenizerFast.from_pretrained(encoder).save_pretrained(other)
    dense(corpus, str(other), cache)
    assert len(list(cache.glob("*-*"))) == 2


def test_what_is_missing_is_named(corpus, encoder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"search\.model: there is no folder \./nowhere"):
        dense(corpus, "./nowhere", tmp_path)
    with pytest.raises(ValueError, match="batch_size: expected 1 or more; got 0"):
        dense(corpus, encoder, tmp_path, batch_size=0)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"^search: DenseSearch needs the package faiss; .*'zs-lightning\[dense\]'$"):
        dense(corpus, encoder, tmp_path)
