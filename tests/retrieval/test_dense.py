"""Dense ranking: exact against brute force, compressed against exact, and the same every time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agentr1.retrieval import dense
from agentr1.retrieval.base import Passage
from agentr1.retrieval.dense import DenseIndex, compress, encode_passages
from agentr1.retrieval.encoders import Encoder
from retrieval.corpora import random_passages, random_queries, static_encoder

pytest.importorskip("faiss")
pytest.importorskip("model2vec")
PASSAGES = random_passages(1500)
QUERIES = random_queries(80)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return static_encoder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def flat(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> DenseIndex:
    folder = tmp_path_factory.mktemp("flat")
    encode_passages(PASSAGES, Encoder(encoder), "", folder)
    return DenseIndex.open(folder, PASSAGES, encoder, ("", ""))


def test_vectors_have_length_one_and_no_words_have_none(encoder: str) -> None:
    model = Encoder(encoder)
    vectors = model.encode(["w1 w2", "w3", "zebra", ""])
    assert vectors.shape == (4, model.dimensions) == (4, 16)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 0, 0])


def test_the_exact_search_is_brute_force_with_ties_to_the_earlier(flat: DenseIndex) -> None:
    for query, hits in zip(QUERIES, flat.rank(QUERIES, 10), strict=True):
        vector = flat._encoder.encode([query])[0].astype(np.float64)
        scores = (np.asarray(flat._vectors, np.float64) * vector).sum(axis=1)
        order = np.argsort(-scores, kind="stable")[:10]
        assert [place for place, _ in hits] == order.tolist()
        assert [score for _, score in hits] == pytest.approx(scores[order], abs=1e-6)


def test_the_batch_a_query_comes_in_changes_nothing(flat: DenseIndex) -> None:
    together = flat.search(QUERIES, 5)
    assert together == [flat.search([query], 5)[0] for query in QUERIES]
    assert flat.search([], 5) == []


def test_equal_passages_tie_and_the_earlier_wins(encoder: str, tmp_path: Path) -> None:
    passages = [Passage(str(n), "w1", "w2 w3") for n in range(203)]
    encode_passages(passages, Encoder(encoder), "", tmp_path)
    index = DenseIndex.open(tmp_path, passages, encoder, ("", ""))
    for k in (1, 5, 203, 500):
        for found in index.rank(["w2"], k) + index.rank(["w2", "w3"] * 20, k):
            assert [place for place, _ in found] == list(range(min(k, 203)))


def test_a_query_without_known_words_finds_nothing(flat: DenseIndex) -> None:
    assert flat.search(["", "zebra"], 3) == [[], []]
    with pytest.raises(ValueError, match="k of at least 1, got 0"):
        flat.search(["w1"], 0)


def test_an_interrupted_encoding_goes_on_at_the_last_chunk(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_CHUNK", 100)
    model = Encoder(encoder)
    encode, seen = model.encode, []

    def stumble(texts):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(texts)
        return encode(texts)

    monkeypatch.setattr(model, "encode", stumble)
    with pytest.raises(KeyboardInterrupt):
        encode_passages(PASSAGES, model, "", tmp_path)
    with (tmp_path / dense.VECTORS).open("ab") as file:
        file.write(b"cut")  # as if killed within a row
    monkeypatch.setattr(model, "encode", lambda texts: seen.append(texts) or encode(texts))
    encode_passages(PASSAGES, model, "", tmp_path)
    assert [text for texts in seen for text in texts] == [f"{p.title} {p.text}" for p in PASSAGES]
    whole = encode([f"{p.title} {p.text}" for p in PASSAGES])
    written = np.fromfile(tmp_path / dense.VECTORS, np.float32).reshape(whole.shape)
    assert np.abs(written - whole).max() < 1e-6


def test_prefixes_are_put_before_queries_and_passages(encoder: str, tmp_path: Path) -> None:
    passages = [Passage("a", "w5", ""), Passage("b", "w6", "")]
    encode_passages(passages, Encoder(encoder), "w7 ", tmp_path)
    index = DenseIndex.open(tmp_path, passages, encoder, ("w8 ", "w7 "))
    expected = Encoder(encoder).encode(["w7 w5", "w8 w5"])
    assert dict(index.rank(["w5"], 2)[0])[0] == pytest.approx(expected[0] @ expected[1], abs=1e-6)


def test_another_model_under_the_same_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    encoder = static_encoder(tmp_path / "model")
    encode_passages(PASSAGES, Encoder(encoder), "", tmp_path / "index")
    for change in ({"seed": 1}, {"dimensions": 8}):
        static_encoder(tmp_path / "model", **change)
        with pytest.raises(ValueError, match="was not built with this 'model2vec:"):
            DenseIndex.open(tmp_path / "index", PASSAGES, encoder, ("", ""))


def test_the_compressed_search_finds_nearly_what_the_exact_one_does(
    encoder: str, tmp_path: Path
) -> None:
    passages = random_passages(6000, seed=3)
    encode_passages(passages, Encoder(encoder), "", tmp_path)
    exact = DenseIndex.open(tmp_path, passages, encoder, ("", ""))
    compress(tmp_path, len(passages), 16)
    packed = DenseIndex.open(tmp_path, passages, encoder, ("", ""))
    assert packed._ivfpq is not None
    pairs = list(zip(exact.rank(QUERIES, 5), packed.rank(QUERIES, 5), strict=True))
    shared = [len({p for p, _ in a} & {p for p, _ in b}) / 5 for a, b in pairs]
    assert np.mean(shared) > 0.9
    # What both find has the same score: compression proposes, the vectors decide.
    assert all(dict(a)[p] == dict(b)[p] for a, b in pairs for p in dict(a).keys() & dict(b).keys())


@pytest.mark.parametrize("name", ["potion", "model2vec:", "gensim:x"])
def test_an_encoder_is_a_library_and_a_model(name: str) -> None:
    with pytest.raises(ValueError, match="expected LIBRARY:MODEL"):
        Encoder(name)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere' cannot be loaded: .*expected a folder"):
        Encoder(f"model2vec:{tmp_path}/nowhere")


@pytest.mark.parametrize("library", ["model2vec", "sentence_transformers"])
def test_a_missing_library_is_named_with_the_command(library: str) -> None:
    program = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        f"u.find_spec = lambda n, *a: None if n == {library!r} else find(n, *a)\n"
        "from agentr1.retrieval.encoders import Encoder\n"
        f"Encoder({library.replace('_', '-')!r} + ':x')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "which is not installed: pip install 'agentr1[" in done.stderr


def test_a_transformer_of_sentence_transformers_encodes(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "w1", "w2"]
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]"
    )
    config = transformers.BertConfig(
        vocab_size=len(names),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    library.SentenceTransformer(str(tmp_path / "bert"), device="cpu").save(str(tmp_path / "st"))
    model = Encoder(f"sentence-transformers:{tmp_path / 'st'}")
    vectors = model.encode(["w1", "w2 w2", "w1"])
    assert vectors.shape == (3, 8)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1], abs=1e-6)
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-6)
