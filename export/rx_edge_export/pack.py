"""`rx-edge pack`: one archive from which a machine without a network installs and runs a bundle.

`bundle/`, `wheels/` (rx-edge and all that it needs on a machine like this one), `constraints.txt`,
`docs/`, `install.sh`, `SHA256SUMS`. What is missing is found here, by asking pip to resolve the
installation from `wheels/` alone, and not at the hospital. A plain tar, for weights and wheels do
not compress; equal inputs give equal bytes.

In a checkout the wheels are gathered with pip, under the project's constraints and from pip's
cache, so that llama.cpp is not built again. An installed rx-edge has no source to build its own
wheel from: there, `wheels` is a directory that the user prepared.

Does not cover: other platforms or Python versions than this one, GPU wheels, system packages
(Python itself), and who sent the archive (`signing.py`, or its sha256 by another way).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from email import message_from_bytes
from importlib import resources
from pathlib import Path
from urllib.parse import unquote, urlsplit

import rx_edge
from rx_edge.atomic import replacing
from rx_edge.bundle import MANIFEST, Bundle, describe, open_bundle
from rx_edge.errors import ExportError, UsageError
from rx_edge_export.signing import SIGNATURE, refuse_unlisted
from rx_edge_export.steps import Progress

SUMS = "SHA256SUMS"
_SYSTEM = f"{sys.platform} {platform.machine()}"  # "linux x86_64"
_STEPS = 4
# the runtime; a signed bundle brings what checks its signature
_EXTRAS, _SIGNED_EXTRAS = "cpu", "cpu,sign"


@dataclass(frozen=True)
class Packed:
    """The finished archive."""

    sha256: str
    bytes: int
    wheels: int


def pack(
    bundle: Path, out: Path, *, wheels: Path | None = None, progress: Progress | None = None
) -> Packed:
    """Write the archive `out`.

    Args:
        wheels: directory of wheels; None = gather them, which needs a checkout.

    Raises:
        BundleError: the bundle is damaged, unverified, or holds files it does not list.
        UsageError: `out` exists or is inside the bundle, or there is nothing to take wheels from.
        ExportError: a wheel is missing, or the archive cannot be written.
    """

    def step(done: int, detail: str) -> None:
        if progress is not None:
            progress("pack", done, _STEPS, detail)

    step(0, "checking the bundle")
    _check_target(out, bundle)
    opened = open_bundle(bundle)
    refuse_unlisted(opened)
    extras = _SIGNED_EXTRAS if (bundle / SIGNATURE).is_file() else _EXTRAS
    with tempfile.TemporaryDirectory() as directory:
        if wheels is None:
            step(1, "gathering wheels (minutes, if pip has none of llama.cpp in its cache)")
            wheels = gather(Path(directory), extras)
        step(2, "resolving the installation without a network")
        chosen = resolve(wheels, extras)
        step(3, "writing")
        with replacing(out) as part:
            _write(part, opened, chosen, extras)
    entry = describe(out)
    step(_STEPS, "done")
    return Packed(entry.sha256, entry.bytes, len(chosen))


def gather(into: Path, extras: str = _EXTRAS) -> Path:
    """Wheels of rx-edge and its requirements, from a checkout, pip's cache and pip's index.

    Raises:
        UsageError: this rx-edge is not a checkout.
        ExportError: pip failed.
    """
    root = Path(rx_edge.__file__).parents[1]
    if not (root / "pyproject.toml").is_file() or not (root / "constraints.txt").is_file():
        raise UsageError(
            "this rx-edge is installed, not a checkout, so its own wheel cannot be built; name a "
            f'directory with the wheels of "rx-edge[{extras}]": --wheels DIR'
        )
    _pip("wheel", "--wheel-dir", str(into), "--constraint", "constraints.txt", f".[{extras}]",
         cwd=root)  # fmt: skip
    return into


def resolve(wheels: Path, extras: str = _EXTRAS) -> dict[str, Path]:
    """What pip would install on an empty machine from `wheels` alone: "name==version" -> wheel.

    Raises:
        UsageError: `wheels` is no directory with wheels.
        ExportError: a requirement has no fitting wheel.
    """
    if not wheels.is_dir() or not any(wheels.glob("*.whl")):
        raise UsageError(f"{str(wheels)!r} holds no wheels")
    requirement = f"rx-edge[{extras}]=={rx_edge.__version__}"
    report = _pip(
        "install", "--dry-run", "--ignore-installed", "--no-cache-dir", "--quiet", "--no-index",
        "--only-binary", ":all:", "--find-links", str(wheels.resolve()), "--report", "-",
        requirement, cwd=wheels, isolated=True,
    )  # fmt: skip
    found = {}
    for item in json.loads(report)["install"]:
        about = item["metadata"]
        absent = set(item.get("requested_extras", ())) - set(about.get("provides_extra", ()))
        if absent:  # pip only warns, and would leave out what they need
            raise ExportError(
                f"the wheel of {about['name']} {about['version']} has no extra "
                f"{', '.join(sorted(absent))}; take another version of it"
            )
        wheel = Path(unquote(urlsplit(item["download_info"]["url"]).path))
        found[f"{about['name']}=={about['version']}"] = wheel
    return dict(sorted(found.items(), key=lambda pair: pair[0].lower()))


def _pip(*arguments: str, cwd: Path, isolated: bool = False) -> str:
    """Run this environment's pip; `isolated`: no setting may send it elsewhere."""
    flags = ["--disable-pip-version-check", "--no-input"]
    environment = dict(os.environ)
    if isolated:
        flags.append("--isolated")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
        environment["PIP_CONFIG_FILE"] = os.devnull
    result = subprocess.run(
        [sys.executable, "-m", "pip", *flags, *arguments],
        capture_output=True, text=True, check=False, cwd=cwd, env=environment,
    )  # fmt: skip
    if result.returncode:
        raise ExportError(
            f"pip {arguments[0]} failed: {_reason(result.stderr)}; add the missing wheel, or look "
            f"with: pip {arguments[0]} {arguments[-1]}"
        )
    return result.stdout


def _reason(stderr: str) -> str:
    """The first error of pip: the later ones only say that there was one."""
    lines = [x.removeprefix("ERROR: ") for x in stderr.splitlines() if x.startswith("ERROR: ")]
    return lines[0] if lines else "no reason given"


def _write(part: Path, bundle: Bundle, wheels: Mapping[str, Path], extras: str) -> None:
    """All members in the order of their names; `SHA256SUMS` last, for it needs their hashes."""
    members: dict[str, Path | bytes] = {
        f"bundle/{name}": bundle.path(name) for name in bundle.manifest.files
    }
    for name in (MANIFEST, SIGNATURE):
        if (bundle.root / name).is_file():
            members[f"bundle/{name}"] = bundle.root / name
    members |= {f"wheels/{wheel.name}": wheel for wheel in wheels.values()}
    members["constraints.txt"] = "".join(f"{pin}\n" for pin in wheels).encode()
    members |= _texts(bundle, wheels, extras)
    top = "rx-edge-" + (_name(bundle) or "bundle")
    sums = []
    with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(members):
            sums.append(f"{_add(archive, top, name, members[name])}  {name}\n")
        _add(archive, top, SUMS, "".join(sums).encode())


def _add(archive: tarfile.TarFile, top: str, name: str, content: Path | bytes) -> str:
    """Add a member without owner and time (both 0); returns its sha256."""
    info = tarfile.TarInfo(f"{top}/{name}")
    info.mode = 0o755 if name.endswith(".sh") else 0o644
    if isinstance(content, bytes):
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
        return hashlib.sha256(content).hexdigest()
    entry = describe(content)
    info.size = entry.bytes
    with content.open("rb") as stream:
        archive.addfile(info, stream)
    return entry.sha256


def _texts(bundle: Bundle, wheels: Mapping[str, Path], extras: str) -> dict[str, Path | bytes]:
    signed = ""
    if extras == _SIGNED_EXTRAS:
        signed = (
            "4. `/opt/rx-edge/bin/rx-edge verify-signature bundle --public-key SENDER.pem`, with "
            "the sender's\n   public key, which you got by another way.\n"
        )
    values = {
        "NAME": bundle.manifest.name,
        "PYTHON": "{}.{}".format(*sys.version_info[:2]),
        "SYSTEM": _SYSTEM,
        "REQUIREMENT": f"rx-edge[{extras}]",
        "SIGNED": signed,
    }
    texts: dict[str, Path | bytes] = {}
    for name, target in (("install.sh", "install.sh"), ("INSTALL.md", "docs/INSTALL.md")):
        text = (resources.files("rx_edge_export") / "airgap" / name).read_text("utf-8")
        for key, value in values.items():
            text = text.replace(f"@{key}@", value)
        texts[target] = text.encode()
    texts["docs/README.md"] = _readme(wheels[f"rx-edge=={rx_edge.__version__}"])
    if "MODEL_CARD.md" in bundle.manifest.files:
        texts["docs/MODEL_CARD.md"] = bundle.path("MODEL_CARD.md")
    return texts


def _readme(wheel: Path) -> bytes:
    """README.md of the very rx-edge that is packed: the long description in its wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (about,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = message_from_bytes(archive.read(about)).get_payload(decode=True)
    return text if isinstance(text, bytes) else b""


def _name(bundle: Bundle) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", bundle.manifest.name).strip("-.")


def _check_target(out: Path, bundle: Path) -> None:
    if out.exists():
        raise UsageError(f"{str(out)!r} exists; remove it, or choose another --out")
    if out.resolve().is_relative_to(bundle.resolve()):
        raise UsageError(f"{str(out)!r} is inside the bundle; choose another --out")
