"""tokenizer.json -> GGUF: llama.cpp's ids are Hugging Face's ids, or the tokenizer is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from rx_edge.backends import llm_gguf as reader
from rx_edge.errors import ExportError
from rx_edge.model import sentencepiece_check
from rx_edge_export import gguf_tokenizer
from tests.export.gguf_helpers import edit, export
from tests.factories import sentencepiece_files, tiny_llama_dir


def byte_level(regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def split(numbers: str) -> Any:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers
    ) + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


PRE_TOKENIZERS = {
    "gpt-2": byte_level(True),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level(True)]),
    "qwen2": pre_tokenizers.Sequence([split(r"\p{N}"), byte_level(False)]),
    "llama-bpe": pre_tokenizers.Sequence([split(r"\p{N}{1,3}"), byte_level(False)]),
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizer_is_recognised_and_splits_alike(
    copy: Path, tmp_path: Path, name: str
) -> None:
    path = copy / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[name]
    tokenizer.save(str(path))
    edit(path, lambda spec: spec["model"].update(ignore_merges=name == "llama-bpe"))
    assert export(copy, tmp_path / "a.gguf")["tokenizer_pre"] == name
    tokenizer = Tokenizer.from_file(str(path))
    with reader.open(tmp_path / "a.gguf", n_ctx=32, threads=1) as backend:
        for text in ("In 2024 the heart's size", "don't  DON'T\n\n 12345.678 cm ", "µm ≥3 é\r\n"):
            assert backend.tokenize(text) == tokenizer.encode(text).ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model"].update(type="Unigram"), "Unigram"),
        (lambda s: s["model"].update(ignore_merges=True), "ignore_merges is True"),
        (lambda s: s.update(pre_tokenizer=None), "pre_tokenizer .*none"),
        (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"].reverse(), "pre_tokenizer"),
        (lambda s: s.update(normalizer={"type": "NFKC"}), "normalizer 'NFKC'"),
    ],
)
def test_other_tokenizers_are_refused(
    llama: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    spec = json.loads((llama / "tokenizer.json").read_text("utf-8"))
    change(spec)
    with pytest.raises(ExportError, match=message):
        gguf_tokenizer.pre_tokenizer(spec)


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a SentencePiece tokenizer, as OpenLLaMA has."""
    root = tmp_path_factory.mktemp("spm")
    directory = tiny_llama_dir(root / "hf")
    for file in sentencepiece_files(root / "tokenizer").iterdir():
        shutil.copyfile(file, directory / file.name)
    return directory


@pytest.fixture
def spm_copy(spm: Path, tmp_path: Path) -> Path:
    target = tmp_path / "hf"
    shutil.copytree(spm, target)
    return target


LEGACY = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ],
    },
    "pre_tokenizer": None,
}


@pytest.mark.parametrize("layout", [{}, LEGACY], ids=["metaspace", "legacy"])
def test_sentencepiece_splits_alike(spm_copy: Path, tmp_path: Path, layout: dict[str, Any]) -> None:
    edit(spm_copy / "tokenizer.json", lambda spec: spec.update(layout))
    assert export(spm_copy, tmp_path / "a.gguf")["tokenizer_pre"] == gguf_tokenizer.SENTENCEPIECE
    tokenizer = Tokenizer.from_file(str(spm_copy / "tokenizer.json"))
    with reader.open(tmp_path / "a.gguf", n_ctx=32, threads=1) as backend:
        for text in (*sentencepiece_check.TEXTS, "a\tb\r\n", "日本語 is no piece: bytes", ""):
            wanted = tokenizer.encode(text, add_special_tokens=False).ids
            assert backend.tokenize(text) == wanted, text


def test_sentencepiece_without_the_original_model(spm_copy: Path, tmp_path: Path) -> None:
    (spm_copy / "tokenizer.model").unlink()
    export(spm_copy, tmp_path / "a.gguf")


def swap_two_pieces(spec: dict[str, Any]) -> None:
    vocab = spec["model"]["vocab"]
    vocab["e"], vocab["a"] = vocab["a"], vocab["e"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_two_pieces, "says that id .* is"),
        (lambda s: s["model"]["merges"].reverse(), "splits .* differently"),
        (lambda s: s["model"]["merges"].pop(), "no merge makes the piece"),
        (lambda s: s.update(normalizer={"type": "NFKC"}), "not how SentencePiece"),
        (lambda s: s["pre_tokenizer"].update(split=True), "not how SentencePiece"),
    ],
)
def test_a_wrong_conversion_is_refused(
    spm_copy: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(spm_copy / "tokenizer.json", change)
    with pytest.raises(ExportError, match=message):
        export(spm_copy, tmp_path / "a.gguf")
