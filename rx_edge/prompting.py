"""The prompt as token ids around one image slot.

`<img>` and `</img>` are tokenised on their own, apart from the text next to them, because
stock llama.cpp does so (libmtmd adds them as separate text chunks): the same weights then see
the same ids in both runtimes. Token ids always come from the Hugging Face tokenizer file.

Does not cover: chat history, several images (one slot, any number of soft tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from rx_edge.config import PromptConfig
from rx_edge.errors import ConfigError
from rx_edge.types import IntArray, SoftPrompt


@dataclass(frozen=True)
class PromptIds:
    """Token ids before and after the image slot, and the id that ends a report."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    end: int


def load_tokenizer(path: Path) -> Any:
    """The fast tokenizer of a tokenizer.json.

    Raises:
        ConfigError: the file is missing or is not a tokenizer.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ConfigError(f"tokenizer {str(path)!r} cannot be read: {error}") from error


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text`; special tokens in the text count, none are added."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def prompt_ids(prompt: PromptConfig, tokenizer: Any) -> PromptIds:
    """Tokenise the template once.

    Raises:
        ConfigError: not exactly one {image} slot, or the end marker / BOS is no single token.
    """
    if prompt.template.count("{image}") != 1:
        raise ConfigError(
            f"prompt.template has {prompt.template.count('{image}')} {{image}} slots; one is needed"
        )
    head, tail = prompt.template.split("{image}")
    end = tokenizer.token_to_id(prompt.end_of_report)
    if end is None:
        raise ConfigError(
            f"prompt.end_of_report {prompt.end_of_report!r} is not one token of this tokenizer"
        )
    before = [*encode(tokenizer, head), *encode(tokenizer, prompt.image_begin)]
    after = [*encode(tokenizer, prompt.image_end), *encode(tokenizer, tail)]
    if prompt.add_bos:
        before.insert(0, _bos(tokenizer))
    return PromptIds(tuple(before), tuple(after), int(end))


def layout(ids: PromptIds, soft_prompt: SoftPrompt) -> list[IntArray | SoftPrompt]:
    """The segments to prefill: text ids (T,), soft prompt (N, D_lm), text ids (T,)."""
    return [np.asarray(ids.before, np.int32), soft_prompt, np.asarray(ids.after, np.int32)]


def _bos(tokenizer: Any) -> int:
    # an empty text with special tokens added is the BOS alone, where the tokenizer has one
    ids = tokenizer.encode("", add_special_tokens=True).ids
    if not ids:
        raise ConfigError("prompt.add_bos is set, but this tokenizer adds no BOS token")
    return int(ids[0])
