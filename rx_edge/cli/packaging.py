"""`rx-edge keygen`, `sign`, `verify-signature` and `pack`: a bundle on its way to a hospital."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rx_edge.cli.common import BundleArgument, progress, say


def keygen(
    private: Annotated[Path, typer.Argument(help="private key to write; keep it secret")],
    public: Annotated[Path, typer.Argument(help="public key to write; give it to hospitals")],
) -> None:
    """Make a key pair for signing bundles (EC P-256, PEM)."""
    from rx_edge_export import signing

    signing.keygen(private, public)
    say(f"written: {private} (secret, no password) and {public}")


def sign(
    bundle: BundleArgument,
    key: Annotated[Path, typer.Option("--key", help="private key, PEM")],
    out: Annotated[
        Path | None, typer.Option("--out", help="signature file; default: model.sig in the bundle")
    ] = None,
) -> None:
    """Sign a verified bundle (OpenSSF model signing, no network)."""
    from rx_edge_export import signing

    say(f"written: {signing.sign(bundle, key, out)}")


def verify_signature(
    bundle: BundleArgument,
    public_key: Annotated[
        Path, typer.Option("--public-key", help="the sender's key, obtained by another way")
    ],
    signature: Annotated[
        Path | None,
        typer.Option("--signature", help="signature file; default: model.sig in the bundle"),
    ] = None,
) -> None:
    """Check who signed a bundle, and that no file was changed, added or removed since."""
    from rx_edge_export import signing

    signing.verify_signature(bundle, public_key, signature)
    say(f"signed with the key of {public_key}: {bundle}")


def pack(
    bundle: BundleArgument,
    out: Annotated[Path, typer.Option("--out", help="archive to write, .tar")],
    wheels: Annotated[
        Path | None,
        typer.Option("--wheels", help="directory of wheels; default: gathered from a checkout"),
    ] = None,
) -> None:
    """Archive a bundle with all that an off-line machine like this one needs to run it."""
    from rx_edge_export.pack import pack as run_pack

    with progress() as bars:
        made = run_pack(bundle, out, wheels=wheels, progress=bars)
    say(f"written: {out} ({made.bytes / 1e6:.0f} MB, {made.wheels} wheels)")
    say(f"sha256 {made.sha256}: tell it to the hospital by another way")
