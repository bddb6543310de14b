"""Texts to vectors: a named model of sentence-transformers or model2vec behind one function.

Layer 1. Both libraries are optional and imported only when one of their models is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DEFAULT = "model2vec:minishlab/potion-retrieval-32M"
"""Static embeddings made for retrieval: a laptop encodes thousands of passages a second."""

_EXTRAS = {"model2vec": "search", "sentence-transformers": "sentence-transformers"}
_BATCH = 64


class Encoder:
    """Turns texts into vectors of length one.

    Args:
        name: `LIBRARY:MODEL`, the library model2vec or sentence-transformers, the model a folder or
            a name on the Hub.

    Raises:
        ValueError: no such library, or the model cannot be loaded.
        ImportError: the library is not installed.
    """

    def __init__(self, name: str) -> None:
        library, _, model = name.partition(":")
        if library not in _EXTRAS or not model:
            raise ValueError(
                f"encoder {name!r}: expected LIBRARY:MODEL, the library one of "
                f"{' or '.join(_EXTRAS)}, such as {DEFAULT}"
            )
        if importlib.util.find_spec(library.replace("-", "_")) is None:
            raise ImportError(
                f"encoder {name!r} needs {library}, which is not installed: "
                f"pip install 'agentr1[{_EXTRAS[library]}]'"
            )
        load = _model2vec if library == "model2vec" else _sentence_transformer
        try:
            self._encode = load(model)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"encoder {name!r} cannot be loaded: {error}; expected a folder or a model of the "
                "Hub"
            ) from error
        self.dimensions = len(self.encode(["a"])[0])

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Encode texts: (texts, dimensions), float32, rows of length one, or zero for no words."""
        vectors = np.asarray(self._encode(list(texts)), dtype=np.float32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(norms > 0, norms, 1)


def lasting(name: str) -> str:
    """The name of an encoder as it means the same from any folder: a model's folder in full."""
    library, _, model = name.partition(":")
    return f"{library}:{Path(model).resolve()}" if model and Path(model).is_dir() else name


def _model2vec(name: str) -> Callable[[list[str]], Any]:
    from model2vec import StaticModel

    model = StaticModel.from_pretrained(name)
    return lambda texts: model.encode(texts, use_multiprocessing=False)


def _sentence_transformer(name: str) -> Callable[[list[str]], Any]:
    # Imported by name, so that the type check does not need this library either.
    library = importlib.import_module("sentence_transformers")
    model = library.SentenceTransformer(name)
    return lambda texts: model.encode(texts, batch_size=_BATCH, show_progress_bar=False)
