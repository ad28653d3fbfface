"""The prompt as token ids around one image slot.

`<img>` and `</img>` are tokenised on their own, apart from the text next to them, because
stock llama.cpp does so (libmtmd adds them as separate text chunks): the same weights then see
the same ids in both runtimes. Token ids always come from the Hugging Face tokenizer file.

A study's indication is ordinary text inside the prompt: never a special token, and never longer
than `MAX_INDICATION_TOKENS`.

Does not cover: chat history. One slot holds any number of soft tokens, of several images too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from rx_edge.config import PromptConfig
from rx_edge.errors import ConfigError, InputError
from rx_edge.types import IntArray, SoftPrompt

SLOT = "{image}"
INDICATION = "{indication}"
MAX_INDICATION_TOKENS = 64  # an indication is a phrase; what is pasted in by mistake is a letter


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


def prompt_ids(prompt: PromptConfig, tokenizer: Any, indication: str = "") -> PromptIds:
    """Tokenise the template for one study; `before` is the same for all.

    Args:
        indication: why the study was asked for, fitted here (`fitted_indication`); "" = not stated.

    Raises:
        ConfigError: not exactly one {image} slot, an {indication} slot before it or twice, or the
            end marker / BOS is no single token.
        InputError: an indication for a template without a slot, or one with a special token in it.
    """
    head, tail = _around_slot(prompt)
    text, _ = fitted_indication(tokenizer, indication)
    if INDICATION in tail:
        tail = tail.replace(INDICATION, text or prompt.no_indication)
    elif text:
        raise InputError(
            "this model was trained without indications: its prompt has no {indication} slot; "
            "leave the indication out"
        )
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


def takes_indication(prompt: PromptConfig) -> bool:
    """Whether the model reads why a study was asked for."""
    return INDICATION in prompt.template


def filled(prompt: PromptConfig) -> str:
    """The template of a study without an indication, its {image} slot open."""
    return prompt.template.replace(INDICATION, prompt.no_indication)


def fitted_indication(tokenizer: Any, text: str) -> tuple[str, bool]:
    """`text` on one line and cut to `MAX_INDICATION_TOKENS`, and whether it was cut.

    Training and serving cut alike. The cut is at the last word that fits.

    Raises:
        InputError: a special token is spelled out in it.
    """
    words = text.split()
    refuse_special(tokenizer, " ".join(words))
    kept = words[:MAX_INDICATION_TOKENS]  # a word is a token at least
    while kept and len(encode(tokenizer, " ".join(kept))) > MAX_INDICATION_TOKENS:
        kept = kept[:-1]
    return " ".join(kept), len(kept) < len(words)


def refuse_special(tokenizer: Any, indication: str) -> None:
    """A marker such as <|im_end|> in free text would end the prompt early.

    Raises:
        InputError: there is one.
    """
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.content in indication:
            raise InputError(
                f"the indication contains {token.content!r}, a control token of this model; "
                "remove it"
            )


def layout(ids: PromptIds, soft_prompt: SoftPrompt) -> list[IntArray | SoftPrompt]:
    """The segments to prefill: text ids (T,), soft prompt (N, D_lm), text ids (T,)."""
    return [np.asarray(ids.before, np.int32), soft_prompt, np.asarray(ids.after, np.int32)]


def _around_slot(prompt: PromptConfig) -> tuple[str, str]:
    found = prompt.template.count(SLOT)
    if found != 1:
        raise ConfigError(f"prompt.template has {found} {SLOT} slots; one is needed")
    head, tail = prompt.template.split(SLOT)
    if INDICATION in head or tail.count(INDICATION) > 1:
        raise ConfigError(
            f"prompt.template may have one {INDICATION} slot, after {SLOT}: what comes before the "
            "image is constant, so that its KV state can be kept"
        )
    return head, tail


def _bos(tokenizer: Any) -> int:
    # an empty text with special tokens added is the BOS alone, where the tokenizer has one
    ids = tokenizer.encode("", add_special_tokens=True).ids
    if not ids:
        raise ConfigError("prompt.add_bos is set, but this tokenizer adds no BOS token")
    return int(ids[0])
