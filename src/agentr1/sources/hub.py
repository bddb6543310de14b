"""Records of a data set from the Hugging Face Hub, streamed: nothing is downloaded as a whole.

Layer 1. The only module that asks the network; `datasets` is imported when it is asked, since the
import alone takes two seconds and more than a gigabyte of address space.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import httpx2

from agentr1.sources.table import DataSet


def read_hub(dataset: DataSet, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the place and the columns of every row.

    Args:
        dataset: entry of the table.
        split: our name of it.

    Raises:
        ConnectionError: the Hub cannot be reached or does not have it; says what to do instead.
    """
    from datasets import load_dataset

    place = f"{dataset.repository} ({dataset.config}, {dataset.hub_splits[split]})"
    number = 0
    try:
        rows = load_dataset(
            dataset.repository,
            dataset.config,
            split=dataset.hub_splits[split],
            revision=dataset.revision,
            streaming=True,
        )
        for number, row in enumerate(rows, start=1):
            yield f"{place}, row {number}", row
    except (OSError, httpx2.HTTPError) as error:
        raise ConnectionError(
            f"{place} at revision {dataset.revision[:12]} cannot be read after row {number}: "
            f"{error}. Without the Hub, fetch the official files ({dataset.home}) or copy the "
            "repository from a machine that reaches it (hf download --repo-type dataset "
            f"{dataset.repository}), and give their folder as --source PATH"
        ) from error
