"""tokenizer.json (byte-level BPE or SentencePiece BPE) -> the tokenizer metadata of a GGUF file.

llama.cpp has no general pre-tokenizer: it knows a list of named ones ("smollm", "qwen2", ...),
and the wrong name splits text differently without any error. So the name is read off the
pre-tokenizer's own definition in tokenizer.json, and a definition that is not in the table
below is refused. The runtime feeds ids from tokenizer.json anyway; the metadata serves stock
llama.cpp and the check that both tokenizers agree.

A SentencePiece tokenizer of which the original `tokenizer.model` is there must also agree with
that one: the fast conversion of OpenLLaMA's was wrong upstream.

Does not cover: Unigram and WordPiece tokenizers (refused), the `lstrip`/`rstrip` flags of added
tokens and Unicode normalisation, which GGUF cannot express. SentencePiece text that *begins*
with a space gets one space more in llama.cpp than in Hugging Face's tokenizer.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer

from rx_edge.errors import ExportError, ModelError
from rx_edge.model import sentencepiece_check

SENTENCEPIECE = "sentencepiece"  # returned in place of a pre-tokenizer's name

_BYTES = ("ByteLevel", "prefix_space=False", "regex=False")
_GPT2 = ("ByteLevel", "prefix_space=False", "regex=True")
_DIGITS = ("Digits", "individual=True")


def _split(numbers: str) -> tuple[str, ...]:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return ("Split", pattern, "Isolated", "invert=False")


# pre_tokenizer of tokenizer.json, as `_steps` spells it -> llama.cpp's name for it
PRE_TOKENIZERS = {
    (_GPT2,): "gpt-2",
    (_DIGITS, _GPT2): "smollm",
    (_split(r"\p{N}{1,3}"), _BYTES): "llama-bpe",  # Llama 3
    (_split(r"\p{N}"), _BYTES): "qwen2",
}


def add_tokenizer(writer: Any, model_dir: Path, vocab_size: int) -> str:
    """Add the tokenizer's keys to a `gguf.GGUFWriter`.

    Args:
        vocab_size: rows of the embedding table; ids without a token become unused `[PADn]`.

    Returns:
        The name of the pre-tokenizer.

    Raises:
        ExportError: a file is missing or the tokenizer is of a kind not covered here.
    """
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise ExportError(
            f"{str(model_dir)!r} has no tokenizer.json; save it with a fast tokenizer"
        )
    spec = json.loads(path.read_text(encoding="utf-8"))
    if spec["model"].get("byte_fallback"):
        pre = _add_sentencepiece(writer, spec, model_dir, vocab_size)
    else:
        pre = pre_tokenizer(spec)
        tokens, types = _tokens(spec, vocab_size)
        writer.add_tokenizer_model("gpt2")  # llama.cpp's name for every byte-level BPE
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([f"{a} {b}" for a, b in _merges(spec)])
    _add_special_tokens(writer, model_dir, path)
    return pre


def _merges(spec: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs in order of rank: "a b" in old files, ["a", "b"] since tokenizers 0.20."""
    pairs = (m.split(" ") if isinstance(m, str) else m for m in spec["model"]["merges"])
    return [(a, b) for a, b in pairs]


def pre_tokenizer(spec: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a parsed tokenizer.json.

    Raises:
        ExportError: no byte-level BPE, or one that llama.cpp would split differently.
    """
    model = spec["model"]
    if model["type"] != "BPE":
        raise ExportError(
            f"tokenizer.json holds a {model['type']} model; only byte-level BPE and SentencePiece "
            "BPE can be exported to GGUF"
        )
    steps = tuple(_steps(spec.get("pre_tokenizer") or {"type": "none"}))
    name = PRE_TOKENIZERS.get(steps)
    if name is None:
        raise ExportError(
            f"tokenizer.json: pre_tokenizer {steps} is none of those that llama.cpp and this "
            f"exporter share: {', '.join(PRE_TOKENIZERS.values())}"
        )
    normalizer = spec.get("normalizer")
    if normalizer is not None and (name, normalizer["type"]) != ("qwen2", "NFC"):
        # NFC changes nothing in the composed text that reports are written in
        raise ExportError(
            f"tokenizer.json: normalizer {normalizer['type']!r} is unknown to llama.cpp; "
            "export a tokenizer without one"
        )
    if bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        raise ExportError(
            f"tokenizer.json: model.ignore_merges is {bool(model.get('ignore_merges'))}, "
            f"but llama.cpp's {name!r} assumes the opposite"
        )
    return name


def _steps(step: dict[str, Any]) -> list[tuple[str, ...]]:
    """A pre-tokenizer as a flat list of the options that change how it splits."""
    kind = step["type"]
    if kind == "Sequence":
        return [flat for inner in step["pretokenizers"] for flat in _steps(inner)]
    if kind == "ByteLevel":
        regex = step.get("use_regex", True)
        return [(kind, f"prefix_space={step['add_prefix_space']}", f"regex={regex}")]
    if kind == "Digits":
        return [(kind, f"individual={step['individual_digits']}")]
    if kind == "Split":
        pattern = step["pattern"].get("Regex", f"literal {step['pattern']}")
        return [(kind, pattern, step["behavior"], f"invert={step['invert']}")]
    return [(kind,)]


def _tokens(spec: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * vocab_size
    named = [(i, text, gguf.TokenType.NORMAL) for text, i in spec["model"]["vocab"].items()]
    for added in spec["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        named.append((added["id"], added["content"], kind))
    for i, text, kind in named:
        if i >= vocab_size:
            raise ExportError(
                f"token {text!r} has id {i}, but config.json's vocab_size is {vocab_size}; "
                "resize the model's embeddings and save it again"
            )
        tokens[i], types[i] = text, int(kind)
    return tokens, types


def _add_sentencepiece(writer: Any, spec: dict[str, Any], model_dir: Path, vocab: int) -> str:
    """A SentencePiece BPE: pieces and scores; the rank of a merge is the score of its result."""
    prefix = _space_prefix(spec)
    try:
        sentencepiece_check.check(model_dir)
    except ModelError as error:
        raise ExportError(str(error)) from error
    tokens, types = _tokens(spec, vocab)
    scores = [0.0] * vocab
    ids: dict[str, int] = spec["model"]["vocab"]
    made: set[str] = set()
    for rank, (a, b) in enumerate(_merges(spec)):
        if a + b not in made:  # several pairs can give one piece; the first one decides
            made.add(a + b)
            scores[ids[a + b]] = -float(rank)
    added = {t["content"] for t in spec["added_tokens"]}
    for text, i in ids.items():
        if text in added:
            continue
        if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            types[i] = int(gguf.TokenType.BYTE)
        elif len(text) > 1 and text not in made:
            raise ExportError(
                f"tokenizer.json: no merge makes the piece {text!r}, but llama.cpp would make it "
                "from its parts; convert tokenizer.model again"
            )
        elif len(text) == 1:
            scores[i] = -float(len(made) + i)  # below every merge
    unknown = spec["model"].get("unk_token") or "<unk>"
    if unknown in ids:
        types[ids[unknown]] = int(gguf.TokenType.UNKNOWN)
    writer.add_tokenizer_model("llama")  # llama.cpp's name for SentencePiece
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(prefix)
    return SENTENCEPIECE


def _space_prefix(spec: dict[str, Any]) -> bool:
    """Whether a text gets a space in front.

    Raises:
        ExportError: the tokenizer splits or normalises in a way that llama.cpp does not.
    """
    normalizer, pre = spec.get("normalizer"), spec.get("pre_tokenizer")
    steps = (normalizer or {}).get("normalizers", [])
    legacy = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    if steps == legacy and pre is None:
        return True
    if normalizer is None and pre and pre["type"] == "Metaspace" and not pre.get("split", True):
        return bool(pre["prepend_scheme"] != "never")
    raise ExportError(
        f"tokenizer.json: normalizer {normalizer} with pre_tokenizer {pre} is not how "
        "SentencePiece BPE works in llama.cpp; convert tokenizer.model again"
    )


def _add_special_tokens(writer: Any, model_dir: Path, path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(path))
    config_path = model_dir / "tokenizer_config.json"
    if not config_path.is_file():
        raise ExportError(f"{str(model_dir)!r} has no tokenizer_config.json; save the tokenizer")
    config = json.loads(config_path.read_text(encoding="utf-8"))
    ids: dict[str, int] = {}
    for role in ("bos", "eos", "pad", "unk"):
        token = config.get(f"{role}_token")
        text = token["content"] if isinstance(token, dict) else token
        if text is None:
            continue
        token_id = tokenizer.token_to_id(text)
        if token_id is None:
            raise ExportError(
                f"tokenizer_config.json: {role}_token {text!r} is no token of tokenizer.json"
            )
        ids[role] = token_id
        getattr(writer, f"add_{role}_token_id")(token_id)
    # what the tokenizer puts around a text is asked of it, not guessed from its settings
    around = tokenizer.encode("", add_special_tokens=True).ids
    add_bos = bool(around) and around[0] == ids.get("bos")
    add_eos = len(around) > add_bos and around[-1] == ids.get("eos")
    if len(around) != add_bos + add_eos:
        raise ExportError(
            f"tokenizer.json puts the ids {around} around every text; GGUF can only say BOS and EOS"
        )
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(add_eos)
    template = model_dir / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))
    elif isinstance(config.get("chat_template"), str):
        writer.add_chat_template(config["chat_template"])
