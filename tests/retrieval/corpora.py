"""Small corpora, written to files, and an embedding model that is made here."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from agentr1.retrieval.base import Passage

WORDS = [f"w{n}" for n in range(60)]


def random_passages(count: int, seed: int = 0) -> list[Passage]:
    """Passages of few different words, so that many share some and many tie."""
    rng = random.Random(seed)
    return [
        Passage(f"p{n}", rng.choice(WORDS), " ".join(rng.choices(WORDS, k=rng.randint(0, 12))))
        for n in range(count)
    ]


def random_queries(count: int, seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(count)]


def write_corpus(path: Path, passages: Iterable[Passage]) -> Path:
    lines = (json.dumps({"id": p.id, "title": p.title, "text": p.text}) for p in passages)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def static_encoder(folder: Path, seed: int = 0, dimensions: int = 16) -> str:
    """A model2vec model with a random vector for each word, in a folder; the name of its encoder.

    A text is the mean of its words, so two texts with a word in common are nearer than two without.
    """
    from model2vec import StaticModel
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["[UNK]", "[PAD]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vectors = np.random.default_rng(seed).normal(size=(len(names), dimensions)).astype(np.float32)
    vectors[:2] = 0.0
    StaticModel(vectors=vectors, tokenizer=tokenizer).save_pretrained(str(folder))
    return f"model2vec:{folder}"
