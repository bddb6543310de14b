"""The data sets: whose they are, how they may be used, where they are found and who reads them.

Layer 1. A plain table; nothing is registered. A revision of the Hub is pinned for each, so that the
same command gives the same rows next year.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from agentr1.sources import bamboogle, gsm8k, hotpotqa, musique, nq, twowiki
from agentr1.sources.base import Reader

SPLITS = ("train", "dev", "test")
MIX = "agent-r1"
MIX_TRAIN = ("hotpotqa", "2wiki")
MIX_DEV = ("hotpotqa", "2wiki", "musique")
MIX_ROWS = 25_600
"""Of each of `MIX_TRAIN`: what Agent-R1 (arXiv 2511.14460) trains on."""


@dataclasses.dataclass(frozen=True, slots=True)
class DataSet:
    """One published data set.

    Attributes:
        title: its name.
        licence: of its questions and passages, as its authors state it.
        home: where it comes from.
        read: turns one of its records into a question.
        repository: of the Hub.
        config: of the repository.
        revision: commit of the repository.
        hub_splits: those with answers, our name to the Hub's.
        files: names of the official files of a split, as patterns, the first to be preferred.
        aliases: name of the official file of further answers, which may be beside these.
    """

    title: str
    licence: str
    home: str
    read: Reader
    repository: str
    config: str
    revision: str
    hub_splits: Mapping[str, str]
    files: Mapping[str, tuple[str, ...]]
    aliases: str | None = None


_TRAIN_DEV = {"train": "train", "dev": "validation"}

DATA_SETS: Mapping[str, DataSet] = {
    "hotpotqa": DataSet(
        title="HotpotQA",
        licence="CC BY-SA 4.0",
        home="https://hotpotqa.github.io",
        read=hotpotqa.read,
        repository="hotpotqa/hotpot_qa",
        # In `fullwiki` the passages of the dev split are what a retriever found, often without the
        # gold ones; `distractor` has them, and the same questions.
        config="distractor",
        revision="1908d6afbbead072334abe2965f91bd2709910ab",
        hub_splits=_TRAIN_DEV,
        files={
            "train": ("hotpot_train_v1*.json",),
            "dev": ("hotpot_dev_distractor_v1*.json", "hotpot_dev_fullwiki_v1*.json"),
        },
    ),
    "2wiki": DataSet(
        title="2WikiMultiHopQA",
        licence="Apache-2.0; passages are Wikipedia text, CC BY-SA",
        home="https://github.com/Alab-NII/2wikimultihop",
        read=twowiki.read,
        repository="framolfese/2WikiMultihopQA",
        config="default",
        revision="fe713bfbd1afbca1a65246741a75890405d56a3a",
        hub_splits=_TRAIN_DEV,
        files={"train": ("train.json",), "dev": ("dev.json",)},
        aliases="id_aliases.json",
    ),
    "musique": DataSet(
        title="MuSiQue",
        licence="CC BY 4.0; passages are Wikipedia text, CC BY-SA",
        home="https://github.com/StonyBrookNLP/musique",
        read=musique.read,
        repository="bdsaglam/musique",
        config="answerable",
        revision="22873a405dd809893b22ada0b499299fb612d2df",
        hub_splits=_TRAIN_DEV,
        files={
            split: (f"musique_ans_v1.0_{split}.jsonl", f"musique_full_v1.0_{split}.jsonl")
            for split in ("train", "dev")
        },
    ),
    "bamboogle": DataSet(
        title="Bamboogle",
        licence="not stated with the data",
        home="https://github.com/ofirpress/self-ask",
        read=bamboogle.read,
        repository="chiayewken/bamboogle",
        config="default",
        revision="5787baaae24a33baee4cf57a4cc743e8a02cd548",
        hub_splits={"test": "test"},
        files={"test": ("Bamboogle*.csv", "bamboogle*.csv")},
    ),
    "nq": DataSet(
        title="NQ-open",
        licence="CC BY-SA 3.0",
        home="https://github.com/google-research-datasets/natural-questions",
        read=nq.read,
        repository="google-research-datasets/nq_open",
        config="nq_open",
        revision="5dd9790a83002ad084ddeb7c420dc716852c6f28",
        hub_splits=_TRAIN_DEV,
        files={"train": ("NQ-open.train.jsonl",), "dev": ("NQ-open.dev.jsonl",)},
    ),
    "gsm8k": DataSet(
        title="GSM8K",
        licence="MIT",
        home="https://github.com/openai/grade-school-math",
        read=gsm8k.read,
        repository="openai/gsm8k",
        config="main",
        revision="740312add88f781978c0658806c59bc2815b9866",
        hub_splits={"train": "train", "test": "test"},
        files={"train": ("train.jsonl",), "test": ("test.jsonl",)},
    ),
}
NAMES = (*DATA_SETS, MIX)
