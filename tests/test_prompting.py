"""The prompt as ids: apart from its neighbours around the image, in one fixed order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from rx_edge.config import PromptConfig
from rx_edge.errors import ConfigError
from rx_edge.prompting import PromptIds, encode, layout, load_tokenizer, prompt_ids

PROMPT = PromptConfig()


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    return load_tokenizer(tiny_base / "llama" / "tokenizer.json")


@pytest.mark.parametrize("template", ["no slot", "{image}{image}"])
def test_exactly_one_slot(tokenizer: Any, template: str) -> None:
    with pytest.raises(ConfigError, match=rf"has {template.count('{')} {{image}} slots"):
        prompt_ids(replace(PROMPT, template=template), tokenizer)


def test_end_must_be_one_token(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="'the end' is not one token"):
        prompt_ids(replace(PROMPT, end_of_report="the end"), tokenizer)
    assert prompt_ids(PROMPT, tokenizer).end == tokenizer.token_to_id("<|im_end|>")


def test_text_is_kept_and_special_tokens_are_ids(tokenizer: Any) -> None:
    ids = prompt_ids(PROMPT, tokenizer)
    head, tail = PROMPT.template.split("{image}")
    decoded = [
        tokenizer.decode(list(i), skip_special_tokens=False) for i in (ids.before, ids.after)
    ]
    assert decoded == [head + "<img>", "</img>" + tail]
    assert ids.before[0] == tokenizer.token_to_id("<|im_start|>")


def test_wrapper_is_tokenised_apart(tokenizer: Any) -> None:
    # "></" is one token of this tokenizer, so text glued to the wrapper would give other ids
    glued = replace(PROMPT, template="<{image}</x>", image_begin="/img>", image_end="<img>")
    ids = prompt_ids(glued, tokenizer)
    assert ids.after == (*encode(tokenizer, "<img>"), *encode(tokenizer, "</x>"))
    assert ids.before == (*encode(tokenizer, "<"), *encode(tokenizer, "/img>"))
    assert list(ids.after) != encode(tokenizer, "<img></x>")


def test_add_bos(tokenizer: Any) -> None:
    prompt = replace(PROMPT, add_bos=True)
    with pytest.raises(ConfigError, match="adds no BOS"):
        prompt_ids(prompt, tokenizer)
    bos = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    plain = prompt_ids(PROMPT, tokenizer)
    assert plain.before[0] != bos
    assert prompt_ids(prompt, tokenizer) == replace(plain, before=(bos, *plain.before))


def test_layout() -> None:
    soft = np.zeros((4, 8), np.float32)
    before, middle, after = layout(PromptIds((1, 2), (3,), 9), soft)
    assert middle is soft
    assert before.tolist() == [1, 2]
    assert after.tolist() == [3]
    assert before.dtype == after.dtype == np.int32


def test_not_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    for path in (tmp_path / "t.json", tmp_path / "absent.json"):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_tokenizer(path)
