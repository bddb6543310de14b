"""The tiny policy before any training: a byte-level BPE with ChatML, and a random Llama.

The tokenizer speaks the real Qwen2.5 template. What a prompt repeats word for word (the template's
text around the tools, the tool's schema, the system line) is one token a phrase: the preamble then
costs a dozen tokens instead of two hundred. Calls and names are ordinary BPE.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
import trl
import world
from demonstrations import SEARCH_SCHEMA, SYSTEM_PROMPT
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# Qwen's rules, except that a word takes no mark along and that a run of marks keeps the spaces
# between them: `": "` is one piece, and a name always starts a new one.
PIECES = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+(?: [^\s\p{L}\p{N}]+)*[\r\n]*|\s*[\r\n]+|\s+"
CALL_PIECES = ('{"', "name", '": "', "search", '", "', "arguments", '": {"', "query", '"}}\n')


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the BPE on the world's inventory and add the phrases of the preamble."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # never reached: merging ends when every piece is whole
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(_inventory(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=1024,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        Path(trl.__path__[0]) / "chat_templates" / "qwen2_5.jinja"
    ).read_text("utf-8")
    _add_whole(tokenizer, MARKERS)
    _add_whole(tokenizer, _preamble_phrases(tokenizer))
    return tokenizer


def _add_whole(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> None:
    tokens: list[str | AddedToken] = [AddedToken(text, normalized=False) for text in texts]
    tokenizer.add_tokens(tokens)


def _inventory() -> list[str]:
    """Pieces of text, the syllables by far most often: their merges come first and stay whole."""
    syllables = [*world.INITIALS, *(f" {one}" for one in world.INITIALS), *world.FINALS]
    english = {"Who", "What", "Which", "The", "system", "user", "assistant", "No", " results"}
    english |= {*world.NOUNS, *world.HOUSES, *CALL_PIECES, "?", ",", ".", ".\n", ":", "\n"}
    english |= {f" {one}" for one in (*world.NOUNS, *world.HOUSES, *world.ADJECTIVES)}
    english |= {f" {year}" for year in world.YEARS}
    english |= {f" {word}" for word in ("The", "is", "the", "of", "older", "or")}
    templates = " ".join(text for texts in world.TEXTS.values() for text in texts)
    crafts = [craft for group in world.CRAFTS.values() for craft in group]
    relations = [relation for group in world.RELATIONS.values() for relation in group]
    words = [*re.findall(r"\w+", re.sub(r"\{\w+\}", "", templates)), *crafts, *relations]
    english |= {f" {word}" for word in words}
    return syllables * 1000 + sorted(english) * 10


def _preamble_phrases(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The parts of a prompt that never change: around the tools, their schema, the system line."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": ""}],
        tools=[SEARCH_SCHEMA],
        tokenize=False,
    )
    assert isinstance(prompt, str)
    schema = next(line for line in prompt.splitlines() if line.startswith('{"type": "function"'))
    system = prompt.split("<|im_end|>")[0].removeprefix("<|im_start|>system\n")
    before, after = system.removeprefix(SYSTEM_PROMPT).split(schema)
    return [SYSTEM_PROMPT, before, schema, after]


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A random Llama of about a million parameters that fits the tokenizer."""
    torch.manual_seed(seed)
    ids = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        # At this width the usual 0.02 leaves attention flat: copying then starts many times later.
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    return LlamaForCausalLM(config)
