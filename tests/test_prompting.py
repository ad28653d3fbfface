"""The prompt as ids: apart from its neighbours around the image, in one fixed order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from rx_edge.config import PromptConfig
from rx_edge.errors import ConfigError, InputError
from rx_edge.prompting import (
    MAX_INDICATION_TOKENS,
    PromptIds,
    encode,
    filled,
    fitted_indication,
    layout,
    load_tokenizer,
    prompt_ids,
    takes_indication,
)

PROMPT = PromptConfig()
TOLD = replace(PROMPT, template=PROMPT.template.replace("{image}", "{image}\nWhy: {indication}."))


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


def test_an_indication_stands_in_its_slot(tokenizer: Any) -> None:
    assert takes_indication(TOLD)
    assert not takes_indication(PROMPT)
    plain, told = prompt_ids(TOLD, tokenizer), prompt_ids(TOLD, tokenizer, "cough")
    assert plain.before == told.before == prompt_ids(PROMPT, tokenizer).before
    for ids, said in ((plain, "not stated"), (told, "cough")):
        text = tokenizer.decode(list(ids.after), skip_special_tokens=False)
        assert text == PROMPT.template.split("{image}")[1].join(["</img>\nWhy: " + said + ".", ""])
    other = replace(TOLD, no_indication="cough")
    assert prompt_ids(other, tokenizer) == told
    assert prompt_ids(other, tokenizer, " \n ") == told  # blank is none
    assert filled(other) == TOLD.template.replace("{indication}", "cough")
    assert prompt_ids(TOLD, tokenizer, "{image}") != plain  # a slot's name in it is text


def test_an_indication_is_never_dropped_in_silence(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="trained without indications") as error:
        prompt_ids(PROMPT, tokenizer, "cough")
    assert "cough" not in str(error.value)
    assert prompt_ids(PROMPT, tokenizer, "  ") == prompt_ids(PROMPT, tokenizer)


@pytest.mark.parametrize("template", ["{indication}{image}", "{image}{indication}{indication}"])
def test_one_indication_slot_after_the_image(tokenizer: Any, template: str) -> None:
    with pytest.raises(ConfigError, match="may have one {indication} slot, after {image}"):
        prompt_ids(replace(PROMPT, template=template), tokenizer)


def test_an_indication_has_no_control_tokens(tokenizer: Any) -> None:
    for given in ("cough <|im_end|> fever", "<|im_start|>", "cough" * 500 + "<|endoftext|>"):
        for call in (
            lambda text: prompt_ids(TOLD, tokenizer, text),
            lambda text: fitted_indication(tokenizer, text),
        ):
            with pytest.raises(InputError, match=r"the indication contains '<\|") as error:
                call(given)
            assert "cough" not in str(error.value)


def test_an_indication_is_cut_at_a_word(tokenizer: Any) -> None:
    assert fitted_indication(tokenizer, " fever,\n\tcough ") == ("fever, cough", False)
    assert fitted_indication(tokenizer, "") == ("", False)
    words = [f"word{n}" for n in range(200)]
    fitted, cut = fitted_indication(tokenizer, " ".join(words))
    kept = fitted.split(" ")
    assert cut
    assert kept == words[: len(kept)]
    tokens = [len(encode(tokenizer, " ".join(words[: len(kept) + more]))) for more in (0, 1)]
    assert tokens[0] <= MAX_INDICATION_TOKENS < tokens[1]
    assert fitted_indication(tokenizer, fitted) == (fitted, False)
    assert prompt_ids(TOLD, tokenizer, " ".join(words)) == prompt_ids(TOLD, tokenizer, fitted)
    assert fitted_indication(tokenizer, "x1y2" * 200) == ("", True)


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
