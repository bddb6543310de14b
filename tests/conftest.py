"""A tokenizer and a model that need no download: bytes plus what chat templates write.

torch, transformers and TRL are imported where they are needed, so that the tests of tools,
environments and parsers start in a blink.
"""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from agentr1.tools.base import schema
from fakes import CountingTool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

    from agentr1.codec import Codec

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# `pytest --hypothesis-profile=random` looks for new examples, and for many more of them.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("random", deadline=None, max_examples=2000)
settings.load_profile("repeatable")


@functools.cache
def _tiny_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from trl.chat_template_utils import qwen2_5_chat_template

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = [qwen2_5_chat_template, json.dumps(schema(CountingTool()))]
    bpe.train_from_iterator(
        corpus * 2,  # a pair must occur twice to be merged
        trainers.BpeTrainer(
            vocab_size=512 - len(MARKUP),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=list(SPECIAL),
            show_progress=False,
        ),
    )
    bpe.add_tokens([AddedToken(name, special=False, normalized=False) for name in MARKUP])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        name_or_path="tiny-qwen",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=qwen2_5_chat_template if template is None else template,
        padding_side="left",
    )


def _tiny_model(seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    values = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": SPECIAL.index("<|im_end|>"),
        "pad_token_id": SPECIAL.index("<|endoftext|>"),
    }
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**values | changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.3)  # peaked: the default weights give a flat distribution
    return model


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`make_tokenizer(template)`: byte-level BPE of 512 tokens, control tokens as in Qwen2.5.

    One object per template: do not change it.
    """
    return _tiny_tokenizer


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Qwen2ForCausalLM]:
    """`make_model(seed, **config)`: a fresh random fp32 Qwen2 for that tokenizer."""
    return _tiny_model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """With Qwen2.5's template; shared, so do not change it."""
    return _tiny_tokenizer()


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its tokenizer, as a folder; do not write to it."""
    from trainers import save_policy

    return save_policy(tmp_path_factory.mktemp("policy"), _tiny_model(), _tiny_tokenizer())


@pytest.fixture(scope="session")
def codec(tokenizer: PreTrainedTokenizerFast) -> Codec:
    """Shows the policy one tool, `lookup(key)`."""
    from agentr1.codec import Codec

    return Codec(tokenizer, [schema(CountingTool())])


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C does something, also where the tests themselves run in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
