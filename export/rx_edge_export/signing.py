"""Who exported this bundle? An OpenSSF model signature over every byte of it, with a local key.

The manifest's hashes show damage; whoever changes a file can write a new manifest. A signature by
a key that the hospital got by another way shows that too. `model.sig` is the standard format of
OpenSSF model signing (a Sigstore bundle around an in-toto statement), so other tools check it as
well; key-based, so neither signing nor checking asks the network. It covers every file of the
directory but itself: a changed, an added and a removed file each fail.

Keys are ordinary PEM files (EC P-256), which `openssl` makes and reads too.

Does not cover: who owns a key (agree on it by another way), revocation, keyless Sigstore, hardware
tokens, time stamps, and whether the bundle is the trained model (`verify`).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from rx_edge.atomic import replacing
from rx_edge.bundle import MANIFEST, Bundle, open_bundle
from rx_edge.errors import BundleError, RxEdgeError, UsageError
from rx_edge.optional import require

SIGNATURE = "model.sig"


def keygen(private: Path, public: Path) -> None:
    """Make a key pair for `sign` and `verify_signature`: EC P-256, PEM, without a password.

    Raises:
        UsageError: a file of that name exists (a lost key cannot be made again), or the directory
            cannot be written.
        MissingExtraError: cryptography is not installed.
    """
    require("cryptography", extra="sign")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    shared = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for path in (private, public):  # before anything is written
        if path.exists():
            raise UsageError(f"{str(path)!r} exists and is not overwritten; choose another name")
    _create(private, secret, 0o600)
    try:
        _create(public, shared, 0o644)
    except RxEdgeError:
        private.unlink()
        raise


def sign(bundle: Path, key: Path, out: Path | None = None) -> Path:
    """Sign a verified bundle.

    Args:
        key: PEM file of an EC private key without a password.
        out: where the signature goes; None = `model.sig` in the bundle.

    Returns:
        The signature file. An older one is replaced.

    Raises:
        BundleError: the bundle is damaged or unverified, or holds files that its manifest does
            not list.
        UsageError: the key cannot be used, or `out` is another file inside the bundle.
        MissingExtraError: model-signing is not installed.
    """
    signing = _library("model_signing.signing")
    refuse_unlisted(open_bundle(bundle))
    out = out or bundle / SIGNATURE
    inside = out.resolve().is_relative_to(bundle.resolve())
    if inside and out.resolve() != bundle.resolve() / SIGNATURE:
        raise UsageError(f"{str(out)!r} is inside the bundle; there, it must be {SIGNATURE!r}")
    with _key_errors("private", key):
        config = signing.Config().use_elliptic_key_signer(private_key=key)
    # the library must not find its own half-written file in the bundle
    with tempfile.TemporaryDirectory() as directory, _quiet():
        made = Path(directory) / SIGNATURE
        config.set_hashing_config(_everything()).sign(bundle, made)
        content = made.read_bytes()
    with replacing(out) as part:
        part.write_bytes(content)
    return out


def verify_signature(bundle: Path, public_key: Path, signature: Path | None = None) -> None:
    """Check that the owner of `public_key` signed exactly these files.

    Args:
        public_key: PEM file, obtained by another way than the bundle.
        signature: None = `model.sig` in the bundle.

    Raises:
        BundleError: no signature, another key's, or a file that was changed, added or removed.
        UsageError: `public_key` is no such key.
        MissingExtraError: model-signing is not installed.
    """
    verifying = _library("model_signing.verifying")
    from cryptography.exceptions import InvalidSignature

    signature = signature or bundle / SIGNATURE
    if not (bundle / MANIFEST).is_file():
        raise BundleError(f"{_name(bundle)} it has no {MANIFEST}; is this the bundle directory?")
    if not signature.is_file():
        raise BundleError(
            f"{_name(bundle)} it is not signed ({str(signature)!r} does not exist); ask its "
            "sender for the signature, or make one with `rx-edge sign`"
        )
    with _key_errors("public", public_key):
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    try:
        with _quiet():
            config.set_hashing_config(_everything()).verify(bundle, signature)
    except InvalidSignature as error:
        raise BundleError(f"{_name(bundle)} {_WRONG_KEY}") from error
    except OSError as error:
        raise BundleError(f"{_name(bundle)} {error}; restore the file") from error
    # a damaged signature fails anywhere in the library's parsers
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{_name(bundle)} {_explain(error)}") from error


def refuse_unlisted(bundle: Bundle) -> None:
    """Nobody vouches for files that the manifest does not list: they are not passed on.

    Raises:
        BundleError: the directory holds one; the first is named.
    """
    known = {*bundle.manifest.files, MANIFEST, SIGNATURE}
    for path in sorted(bundle.root.rglob("*")):
        name = path.relative_to(bundle.root).as_posix()
        if path.is_symlink() or (not path.is_dir() and name not in known):
            raise BundleError(
                f"{_name(bundle.root)} {name!r} is not listed in {MANIFEST} (or is a link): "
                "remove it, or export again"
            )


_WRONG_KEY = (
    "the signature was not made with this key, or was altered; use the public key of the group "
    "that sent the bundle, and do not run the bundle if it is that one"
)


def _explain(error: Exception) -> str:
    text = " ".join(str(error).split())
    if text.startswith("Key mismatch"):
        return _WRONG_KEY
    said = text.removeprefix("Signature mismatch: ")
    if said != text:
        # the library quotes raw digests, whose quoting depends on their bytes
        changed = re.search(r"Hash mismatch for \\*'([^'\\]+)", said)
        said = f"Hash mismatch for '{changed[1]}'" if changed else said
        return f"its files are not those that were signed: {said}; do not run it, fetch it again"
    return f"the signature cannot be checked ({text or type(error).__name__}); fetch it again"


def _everything() -> Any:
    """Hash every file but the signature; the library would leave out .git and its like, too."""
    config = (
        _library("model_signing.hashing")
        .Config()
        .use_file_serialization(hashing_algorithm="sha256")
    )
    return config.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _library(module: str) -> ModuleType:
    require("OpenSSL", extra="sign")  # model-signing imports it without declaring it
    return require(module, extra="sign")


@contextlib.contextmanager
def _key_errors(half: str, key: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{half} key {str(key)!r} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{str(key)!r} is not the {half} half of an EC key (PEM, P-256, P-384 or P-521, no "
            "password); `rx-edge keygen` makes a pair"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The library prints a warning about signatures of its older versions."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _create(path: Path, content: bytes, mode: int) -> None:
    """Write a new file that nobody else could read in between."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be written: {error.strerror}") from error


def _name(bundle: Path) -> str:
    return f"bundle {str(bundle)!r} is refused:"
