"""The bundle's software bill of materials: CycloneDX 1.6 JSON, written at export.

A hospital's security office asks what is inside and what it needs. Three answers, in one graph:
the model (`machine-learning-model`, with the licence of its weights) is made of files (SHA-256
each) and needs the runtime's Python packages, which are those installed at export, transitively.

Two equal exports give equal bytes: there is no time in it, and the serial number is derived from
the content. `manifest.json` and the SBOM itself are not listed, for they hold its hash.

Does not cover: C and C++ libraries inside wheels, the Python interpreter, known vulnerabilities
(scanners match the purls), and how the model behaves (the model card).
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rx_edge.atomic import replacing
from rx_edge.bundle import FileEntry
from rx_edge.errors import ExportError
from rx_edge.optional import require

if TYPE_CHECKING:
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import License

SBOM = "sbom.cdx.json"
RUNTIME = ("rx-edge[cpu]",)  # what a machine needs to run and verify a bundle
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:rx-edge:sbom")

# trove classifiers of older packages that declare no SPDX expression
_CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "GNU Lesser General Public License v3 or later (LGPLv3+)": "LGPL-3.0-or-later",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}


@dataclass(frozen=True)
class Package:
    """An installed Python package.

    Attributes:
        licence: SPDX expression or the author's words; "" where its metadata says nothing.
        needs: canonical names of the packages that it requires here.
    """

    name: str
    version: str
    licence: str
    needs: tuple[str, ...]


def write(
    out: Path,
    *,
    model: str,
    version: str,
    files: Mapping[str, FileEntry],
    licences: Mapping[str, str],
    packages: Sequence[str] = RUNTIME,
) -> None:
    """Write the SBOM of a bundle.

    Args:
        model: the model's name.
        version: what tells it from other models of that name, e.g. the pairing hash.
        files: every other file of the bundle, by path.
        licences: by "code", "weights" and any further part ("data"); "" = not declared.
        packages: requirements whose installed packages are listed with all that they need.

    Raises:
        MissingExtraError: cyclonedx-python-lib is not installed.
        ExportError: a required package is not installed, or `out` cannot be written.
    """
    require("cyclonedx", extra="export")
    from cyclonedx.output.json import JsonV1Dot6

    roots: set[str] = {canonicalize_name(Requirement(text).name) for text in packages}
    bom = _bom(_model(model, version, licences), files, roots, installed(packages))
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    # the library numbers and dates every call anew
    document["metadata"].pop("timestamp", None)
    document.pop("serialNumber", None)
    serial = uuid.uuid5(_NAMESPACE, json.dumps(document, sort_keys=True))
    document["serialNumber"] = serial.urn
    with replacing(out) as part:
        part.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def installed(requirements: Sequence[str]) -> list[Package]:
    """The installed packages that `requirements` need, transitively, sorted by name.

    Raises:
        ExportError: one of them is not installed.
    """
    needs: dict[str, set[str]] = {}
    queue = [Requirement(text) for text in requirements]
    visited: set[tuple[str, str]] = set()
    while queue:
        asked = queue.pop()
        name = canonicalize_name(asked.name)
        needs.setdefault(name, set())
        for extra in ("", *sorted(asked.extras)):
            if (name, extra) not in visited:
                visited.add((name, extra))
                wanted = _requires(name, extra)
                needs[name] |= {canonicalize_name(r.name) for r in wanted} - {name}
                queue += wanted
    return [_package(name, needs[name]) for name in sorted(needs)]


def _requires(name: str, extra: str) -> list[Requirement]:
    """What `name` requires here with `extra` and does not without ("" = without any)."""
    found = []
    for text in _metadata(name).get_all("Requires-Dist") or []:
        asked = Requirement(text)
        always = asked.marker is None or asked.marker.evaluate({"extra": ""})
        with_extra = asked.marker is not None and asked.marker.evaluate({"extra": extra})
        if (always and not extra) or (extra and with_extra and not always):
            found.append(asked)
    return found


def _package(name: str, needs: set[str]) -> Package:
    about = _metadata(name)
    return Package(name, str(about["Version"]), _licence(about), tuple(sorted(needs)))


def _metadata(name: str) -> metadata.PackageMetadata:
    try:
        return metadata.metadata(name)
    except metadata.PackageNotFoundError as error:
        raise ExportError(
            f"the SBOM lists what a bundle needs, and {name!r} is not installed: "
            'pip install "rx-edge[export]"'
        ) from error


def _licence(about: metadata.PackageMetadata) -> str:
    expression = _field(about, "License-Expression")
    if expression:
        return expression
    trove = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or []
             if c.startswith("License :: ")]  # fmt: skip
    known = sorted({_CLASSIFIERS[name] for name in trove if name in _CLASSIFIERS})
    if known and known != ["BSD"]:
        return " AND ".join(known)
    words = _field(about, "License").splitlines()
    # some packages put the whole text there: its first line is the licence's name, or nothing
    if words and len(words[0]) <= 60:
        return re.sub(r"\s+", " ", words[0])
    return known[0] if known else ""


def _field(about: metadata.PackageMetadata, name: str) -> str:
    return str((about.get_all(name) or [""])[0]).strip()


def _bom(
    model: Component, files: Mapping[str, FileEntry], roots: set[str], packages: Sequence[Package]
) -> Bom:
    from cyclonedx.model.bom import Bom, BomMetaData

    bom = Bom(metadata=BomMetaData(component=model))
    parts = [_file(name, entry) for name, entry in sorted(files.items())]
    libraries = {package.name: _library(package) for package in packages}
    for component in (*parts, *libraries.values()):
        bom.components.add(component)
    bom.register_dependency(model, [*parts, *(libraries[name] for name in sorted(roots))])
    for package in packages:
        bom.register_dependency(libraries[package.name], [libraries[n] for n in package.needs])
    return bom


def _model(name: str, version: str, licences: Mapping[str, str]) -> Component:
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component, ComponentType

    # CycloneDX has one licence per component; those of code and data are properties of ours
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        name=name,
        version=version,
        licenses=_licences(licences.get("weights", "")),
        properties=[
            Property(name=f"rx-edge:licence:{part}", value=licence or "not declared")
            for part, licence in sorted(licences.items())
        ],
    )


def _file(name: str, entry: FileEntry) -> Component:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        type=ComponentType.FILE,
        bom_ref=f"file:{name}",
        name=name,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=entry.sha256)],
    )


def _library(package: Package) -> Component:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    purl = PackageURL("pypi", name=package.name, version=package.version)
    return Component(
        type=ComponentType.LIBRARY,
        bom_ref=purl.to_string(),
        name=package.name,
        version=package.version,
        licenses=_licences(package.licence),
        purl=purl,
    )


def _licences(words: str) -> list[License]:
    """As an SPDX id or expression where it is one, else as a name."""
    from cyclonedx.contrib.license.factories import LicenseFactory

    return [LicenseFactory().make_from_string(words)] if words else []
