"""Every reason to refuse a bundle, on hand-made ones. Real bundles: tests/test_end_to_end.py."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from rx_edge.bundle import (
    MANIFEST,
    Artifact,
    Manifest,
    StageResult,
    Verdict,
    image_hash,
    open_bundle,
    pairing_hash,
    prompt_hash,
    schema_for,
)
from rx_edge.config import ImageRecipe, PromptConfig
from rx_edge.config_io import to_mapping
from rx_edge.errors import BundleError

# of the default prompt before there were views and indications
OLD_PROMPT = "5c0e1f04b30bfc061c2611183d087f81a4dda7611fef8c52342351f52b538b68"
STAGE = {"stage": "pixels", "metric": "max", "value": 0.0, "tolerance": 1.0, "passed": True}


def make(root: Path, **changes: Any) -> Path:
    """A verified bundle of one file, with top-level manifest keys replaced."""
    content = b"weights"
    root.mkdir(exist_ok=True)
    for name in ("llm.gguf", "tokenizer.json"):
        (root / name).write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    parts = {
        "prompt": prompt_hash(PromptConfig()),
        "image": image_hash(ImageRecipe()),
        "tokenizer": entry["sha256"],
    }
    manifest = {
        "schema": 2,
        "name": "tiny",
        "files": {"llm.gguf": entry, "tokenizer.json": entry},
        "pairing": pairing_hash(parts),
        "parts": parts,
        "language": [{"file": "llm.gguf", "format": "llm_gguf", "precision": "F16"}],
        "verification": {"passed": True, "stages": [STAGE]},
    }
    (root / MANIFEST).write_text(json.dumps(manifest | changes))
    return root


def test_sound_bundle_opens(tmp_path: Path) -> None:
    bundle = open_bundle(make(tmp_path))
    assert bundle.path("llm.gguf").read_bytes() == b"weights"
    assert (
        bundle.language()
        == bundle.language("F16")
        == bundle.language("gguf:F16")
        == Artifact("llm.gguf", "llm_gguf", "F16")
    )
    assert bundle.digest == hashlib.sha256((tmp_path / MANIFEST).read_bytes()).hexdigest()
    with pytest.raises(BundleError, match="no language model 'Q8_0'; has: gguf:F16"):
        bundle.language("Q8_0")


def test_a_prompt_decides_the_schema_and_older_ones_keep_theirs(tmp_path: Path) -> None:
    plain = PromptConfig()
    assert schema_for(plain) == Manifest().schema == 2
    assert prompt_hash(plain) == OLD_PROMPT
    young = [
        PromptConfig(views="frontal+lateral"),
        PromptConfig(template="{image}{indication}"),
        PromptConfig(no_indication="unknown"),
    ]
    for prompt in young:
        assert schema_for(prompt) == 3
        parts = {
            "prompt": prompt_hash(prompt),
            "image": image_hash(ImageRecipe()),
            "tokenizer": hashlib.sha256(b"weights").hexdigest(),
        }
        changes = {"prompt": to_mapping(prompt), "parts": parts, "pairing": pairing_hash(parts)}
        assert open_bundle(make(tmp_path, schema=3, **changes)).manifest.prompt == prompt
    assert len({prompt_hash(prompt) for prompt in [plain, *young]}) == 4


def test_what_runs_meanwhile_excuses_no_damage(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "llm.gguf").write_bytes(b"weightz")
    seen: list[str] = []
    with pytest.raises(BundleError, match=r"llm\.gguf has sha256"):
        open_bundle(tmp_path, meanwhile=lambda manifest: seen.append(manifest.name))
    assert seen == ["tiny"]
    make(tmp_path)
    with pytest.raises(ZeroDivisionError):  # not swallowed, and no thread is left hashing
        open_bundle(tmp_path, meanwhile=lambda _: 1 // 0)  # type: ignore[arg-type,return-value]


def test_unlisted_file_is_not_handed_out(tmp_path: Path) -> None:
    bundle = open_bundle(make(tmp_path))
    (tmp_path / "extra.bin").touch()
    with pytest.raises(BundleError, match=r"'extra.bin' is not listed"):
        bundle.path("extra.bin")


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read .*rx-edge export"):
        open_bundle(tmp_path / "absent")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"7", b"\xff\xff"])
def test_damaged_manifest(tmp_path: Path, content: bytes) -> None:
    (make(tmp_path) / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json is damaged"):
        open_bundle(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema": 1}, "schema is 1, this rx-edge reads 2 and 3; update rx-edge"),
        ({"schema": 4}, "schema is 4, this rx-edge reads 2 and 3; update rx-edge"),
        ({"prompt": {"views": "frontal+lateral"}}, "its schema is 2, but its prompt needs 3"),
        ({"prompt": {"template": "{image}{indication}"}}, "its schema is 2, but its prompt needs"),
        ({"prompt": {"no_indication": "unknown"}}, "its schema is 2, but its prompt needs 3"),
        ({"schema": 3, "prompt": {"vews": "one"}}, "unknown key 'vews'; did you mean 'views'"),
        ({"verificaton": {}}, "unknown key 'verificaton'; did you mean 'verification'"),
        ({"soft_tokens": "64"}, "soft_tokens is '64'; int is expected"),
        ({"files": {"absent.bin": {}}}, "absent.bin: No such file"),
        ({"files": {"llm.gguf": {"sha256": "00", "bytes": 7}}}, "llm.gguf has sha256"),
        ({"files": {"../x": {}}}, "'../x', which is outside"),
        ({"files": {"a/../../x": {}}}, "outside"),
        ({"files": {"/etc/hostname": {}}}, "outside"),
        ({"files": {"..\\x": {}}}, "outside"),
    ],
)
def test_wrong_manifest(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    make(tmp_path, **changes)
    with pytest.raises(BundleError, match=says):
        open_bundle(tmp_path, allow_unverified=True)


@pytest.mark.parametrize("content", [b"wEights", b"weights!", b"weight", b""])
def test_changed_bytes(tmp_path: Path, content: bytes) -> None:
    (make(tmp_path) / "llm.gguf").write_bytes(content)
    with pytest.raises(BundleError, match=rf"llm.gguf .*\({len(content)} bytes\).*\(7 bytes\)"):
        open_bundle(tmp_path)


@pytest.mark.parametrize(
    "verification",
    [
        {},
        {"passed": False, "stages": [STAGE]},
        {"passed": True, "stages": []},
        {"passed": True, "stages": [STAGE, STAGE | {"passed": False}]},
    ],
)
def test_unverified_needs_to_be_allowed(tmp_path: Path, verification: dict[str, Any]) -> None:
    make(tmp_path, verification=verification)
    with pytest.raises(BundleError, match="no passing verification .*--allow-unverified"):
        open_bundle(tmp_path)
    assert open_bundle(tmp_path, allow_unverified=True).manifest.name == "tiny"


def test_verdict() -> None:
    good, bad = StageResult("pixels", passed=True), StageResult("greedy_tokens")
    assert not Verdict.of([]).passed
    assert Verdict.of([good]).passed
    assert not Verdict.of([good, bad]).passed
    assert Verdict.of([good, bad]).failures() == [bad]


def test_pairing_depends_on_every_part_and_not_on_their_order() -> None:
    parts = {"encoder": "a", "lm": "b"}
    assert pairing_hash(parts) == pairing_hash({"lm": "b", "encoder": "a"})
    assert pairing_hash(parts) != pairing_hash({"encoder": "b", "lm": "a"})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": {"image_begin": ""}}, "its prompt is not the one"),
        ({"image": {"mean": [0.406, 0.456, 0.485]}}, "its image is not the one"),
        ({"tokenizer": "llm.gguf.old"}, "its tokenizer is not the one"),
        ({"pairing": "0" * 64}, "parts and pairing disagree"),
        ({"parts": {}}, "its prompt is not the one"),
    ],
)
def test_what_the_weights_were_trained_with_cannot_be_edited(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(BundleError, match=says):
        open_bundle(make(tmp_path, **changes))
