"""Signing: whoever has not the key cannot change a byte, and nothing asks the network."""

from __future__ import annotations

import base64
import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from rx_edge.bundle import MANIFEST, open_bundle
from rx_edge.cli import packaging
from rx_edge.cli.common import Group
from rx_edge.errors import BundleError, MissingExtraError, UsageError
from rx_edge_export import signing
from rx_edge_export.signing import SIGNATURE
from tests.no_network import no_network


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("keys")
    signing.keygen(root / "private.pem", root / "public.pem")
    return root / "private.pem", root / "public.pem"


@pytest.fixture
def signed(tiny_bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> Path:
    bundle = tmp_path / "signed"
    shutil.copytree(tiny_bundle, bundle)
    signing.sign(bundle, keys[0])
    return bundle


def test_a_signed_bundle_is_verified_and_still_opens(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    signing.verify_signature(signed, keys[1])
    assert SIGNATURE not in open_bundle(signed).manifest.files
    moved = signed.rename(tmp_path / "under-another-name")
    signing.verify_signature(moved, keys[1])


def test_the_signature_names_every_file_and_no_path(signed: Path) -> None:
    envelope = json.loads((signed / SIGNATURE).read_text("utf-8"))["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"]).decode()
    named = {r["name"] for r in json.loads(payload)["predicate"]["resources"]}
    assert named == {*open_bundle(signed).manifest.files, MANIFEST}
    assert str(signed.parent) not in payload


def test_signing_again_replaces_the_signature(signed: Path, keys: tuple[Path, Path]) -> None:
    signing.sign(signed, keys[0])
    signing.verify_signature(signed, keys[1])


def test_a_signature_kept_elsewhere(
    tiny_bundle: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    made = signing.sign(tiny_bundle, keys[0], tmp_path / "demo.sig")
    assert not (tiny_bundle / SIGNATURE).exists()
    signing.verify_signature(tiny_bundle, keys[1], made)
    with pytest.raises(UsageError, match="inside the bundle"):
        signing.sign(tiny_bundle, keys[0], tiny_bundle / "other.sig")


def _flip(bundle: Path) -> None:
    path = bundle / "tokenizer.json"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def _rewrite_manifest(bundle: Path) -> None:
    """What hashes alone cannot show: a changed bundle whose manifest agrees."""
    text = (bundle / MANIFEST).read_text("utf-8")
    (bundle / MANIFEST).write_text(text.replace("Not a medical device", "A medical device"))


def _cut(bundle: Path) -> None:
    content = (bundle / SIGNATURE).read_bytes()
    (bundle / SIGNATURE).write_bytes(content[: len(content) // 2])


def _forge(bundle: Path) -> None:
    document = json.loads((bundle / SIGNATURE).read_text("utf-8"))
    payload = base64.b64decode(document["dsseEnvelope"]["payload"])
    forged = payload.replace(b'"sha256"', b'"blake2"')
    document["dsseEnvelope"]["payload"] = base64.b64encode(forged).decode()
    (bundle / SIGNATURE).write_text(json.dumps(document), "utf-8")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a changed byte": (_flip, "Hash mismatch for 'tokenizer.json'"),
    "a changed manifest": (_rewrite_manifest, "Hash mismatch for 'manifest.json'"),
    "an added file": (lambda b: (b / "extra.txt").write_text("x"), "extra.txt"),
    "an added hidden file": (lambda b: (b / ".gitignore").write_text("x"), "gitignore"),
    "a removed file": (lambda b: (b / "tokenizer.json").unlink(), "Missing.*tokenizer.json"),
    "a link": (lambda b: (b / "link").symlink_to("tokenizer.json"), "link"),
    "no signature": (lambda b: (b / SIGNATURE).unlink(), "not signed"),
    "half a signature": (_cut, "cannot be checked"),
    "an empty signature": (lambda b: (b / SIGNATURE).write_text("{}"), "cannot be checked"),
    "a forged signature": (_forge, "not made with this key"),
    "no manifest": (lambda b: (b / MANIFEST).unlink(), "no manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused(signed: Path, keys: tuple[Path, Path], damage: str) -> None:
    do, message = DAMAGES[damage]
    do(signed)
    with pytest.raises(BundleError, match=message) as caught:
        signing.verify_signature(signed, keys[1])
    assert "\n" not in str(caught.value)


def test_another_key_is_refused(signed: Path, tmp_path: Path) -> None:
    signing.keygen(tmp_path / "a.pem", tmp_path / "b.pem")
    with pytest.raises(BundleError, match="not made with this key"):
        signing.verify_signature(signed, tmp_path / "b.pem")


def test_keys_that_are_none(tiny_bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.pem"
    text.write_text("no key", "utf-8")
    for key in (text, keys[1], tmp_path / "absent.pem"):
        with pytest.raises(UsageError, match=key.name):
            signing.sign(tiny_bundle, key, tmp_path / "x.sig")
    made = signing.sign(tiny_bundle, keys[0], tmp_path / "x.sig")
    for key in (text, keys[0], tmp_path / "absent.pem"):
        with pytest.raises(UsageError, match=key.name):
            signing.verify_signature(tiny_bundle, key, made)


def test_keygen_keeps_the_private_key_private(keys: tuple[Path, Path], tmp_path: Path) -> None:
    assert stat.S_IMODE(keys[0].stat().st_mode) == 0o600
    assert b"PRIVATE" not in keys[1].read_bytes()
    before = keys[0].read_bytes()
    for pair in ((keys[0], tmp_path / "new.pem"), (tmp_path / "new.pem", keys[1])):
        with pytest.raises(UsageError, match="exists and is not overwritten"):
            signing.keygen(*pair)
    assert keys[0].read_bytes() == before
    assert not (tmp_path / "new.pem").exists()
    with pytest.raises(UsageError, match="cannot be written"):
        signing.keygen(tmp_path / "new.pem", tmp_path / "absent" / "public.pem")
    assert not (tmp_path / "new.pem").exists()


def test_only_a_verified_and_complete_bundle_is_signed(
    tiny_bundle: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    (bundle / "notes.txt").write_text("patient list", "utf-8")
    with pytest.raises(BundleError, match=r"'notes.txt' is not listed"):
        signing.sign(bundle, keys[0])
    (bundle / "notes.txt").unlink()
    _flip(bundle)
    with pytest.raises(BundleError, match="sha256"):
        signing.sign(bundle, keys[0])
    assert not (bundle / SIGNATURE).exists()


def test_a_missing_library_names_the_extra(
    tiny_bundle: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "OpenSSL", None)
    with pytest.raises(MissingExtraError, match=r"rx-edge\[sign\]"):
        signing.sign(tiny_bundle, keys[0])


def test_signing_and_checking_need_no_network(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    """In a namespace without a network, and with every socket an error."""
    code = (
        "import socket, sys; from pathlib import Path\n"
        "def refuse(*a, **k): raise AssertionError('the network was asked')\n"
        "socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse\n"
        "from rx_edge_export import signing\n"
        f"bundle = Path({str(signed)!r})\n"
        f"signing.sign(bundle, Path({str(keys[0])!r}))\n"
        f"signing.verify_signature(bundle, Path({str(keys[1])!r}))\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run(
        [*no_network(), sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_other_programs_check_it_too(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """The commands of docs/guides/air-gap.md that are not ours."""
    verify = ["-m", "model_signing", "verify", "key", signed, "--signature", signed / SIGNATURE]
    assert _runs(sys.executable, *verify, "--public_key", keys[1])
    (signed / "extra.txt").write_text("x", "utf-8")
    assert not _runs(sys.executable, *verify, "--public_key", keys[1])
    archive, made = signed / MANIFEST, tmp_path / "archive.sig"
    assert _runs("openssl", "dgst", "-sha256", "-sign", keys[0], "-out", made, archive)
    check = ["openssl", "dgst", "-sha256", "-verify", keys[1], "-signature", made, archive]
    assert _runs(*check)
    _rewrite_manifest(signed)
    assert not _runs(*check)


def _runs(*command: object) -> bool:
    result = subprocess.run([str(c) for c in command], capture_output=True, check=False)
    return result.returncode == 0


def test_the_commands(tiny_bundle: Path, tmp_path: Path) -> None:
    app = typer.Typer(cls=Group, pretty_exceptions_enable=False)
    app.command()(packaging.keygen)
    app.command()(packaging.sign)
    app.command("verify-signature")(packaging.verify_signature)

    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.stdout == ""
        return result.exit_code, result.stderr

    private, public, bundle = tmp_path / "k.pem", tmp_path / "k.pub.pem", tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    assert run("keygen", private, public)[0] == 0
    assert run("keygen", private, public)[0] == 2
    assert run("verify-signature", bundle, "--public-key", public)[0] == 3
    assert run("sign", bundle, "--key", private)[0] == 0
    assert run("verify-signature", bundle, "--public-key", public)[0] == 0
    _flip(bundle)
    code, message = run("verify-signature", bundle, "--public-key", public)
    assert (code, message.count("\n"), message[:9]) == (3, 1, "rx-edge: ")
