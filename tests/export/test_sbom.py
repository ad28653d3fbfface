"""The SBOM: valid CycloneDX, equal bytes each time, nothing left out."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rx_edge
from rx_edge.bundle import FileEntry
from rx_edge.errors import ExportError, MissingExtraError
from rx_edge_export import sbom

FILES = {
    "vision.fp32.onnx": FileEntry("a" * 64, 10),
    "golden/phantom.dcm": FileEntry("b" * 64, 20),
}
LICENCES = {"code": "Apache-2.0", "weights": "non-commercial research demo", "data": ""}


def written(out: Path, **changes: Any) -> dict[str, Any]:
    arguments = {"model": "demo", "version": "c0ffee", "files": FILES, "licences": LICENCES}
    sbom.write(out, **{**arguments, **changes})
    document: dict[str, Any] = json.loads(out.read_text("utf-8"))
    return document


def test_it_is_valid_cyclonedx(tmp_path: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    document = written(tmp_path / sbom.SBOM)
    text = (tmp_path / sbom.SBOM).read_text("utf-8")
    assert document["specVersion"] == "1.6"
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    broken = text.replace('"machine-learning-model"', '"model"')
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(broken) is not None


def test_the_model_its_files_and_their_hashes(tmp_path: Path) -> None:
    document = written(tmp_path / sbom.SBOM)
    model = document["metadata"]["component"]
    assert (model["type"], model["name"], model["version"]) == (
        "machine-learning-model", "demo", "c0ffee",
    )  # fmt: skip
    assert model["licenses"] == [{"license": {"name": LICENCES["weights"]}}]
    stated = {p["name"]: p["value"] for p in model["properties"]}
    assert stated["rx-edge:licence:code"] == "Apache-2.0"
    assert stated["rx-edge:licence:data"] == "not declared"
    hashes = {c["name"]: c["hashes"] for c in document["components"] if c["type"] == "file"}
    assert hashes == {
        name: [{"alg": "SHA-256", "content": entry.sha256}] for name, entry in FILES.items()
    }


def test_the_runtime_is_listed_with_all_that_it_needs(tmp_path: Path) -> None:
    document = written(tmp_path / sbom.SBOM)
    libraries = {c["name"]: c for c in document["components"] if c["type"] == "library"}
    assert libraries["rx-edge"]["version"] == rx_edge.__version__
    # direct, by the extra, and through tokenizers
    assert {"numpy", "llama-cpp-python", "onnxruntime", "huggingface-hub"} <= libraries.keys()
    assert not {"torch", "transformers", "pytest"} & libraries.keys()
    assert libraries["numpy"]["purl"].startswith("pkg:pypi/numpy@")
    assert all("licenses" in library for library in libraries.values())
    graph = {d["ref"]: set(d.get("dependsOn", ())) for d in document["dependencies"]}
    assert libraries["rx-edge"]["bom-ref"] in graph["model"]
    assert libraries["numpy"]["bom-ref"] in graph[libraries["onnxruntime"]["bom-ref"]]


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    first = written(tmp_path / "a.json")
    written(tmp_path / "b.json", files=dict(reversed(FILES.items())))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert "timestamp" not in first["metadata"]
    changed = {**FILES, "vision.fp32.onnx": replace(FILES["vision.fp32.onnx"], sha256="d" * 64)}
    other = written(tmp_path / "c.json", files=changed)
    assert other["serialNumber"] != first["serialNumber"]


def test_it_names_no_host_and_no_path_of_this_machine(tmp_path: Path) -> None:
    written(tmp_path / sbom.SBOM)
    text = (tmp_path / sbom.SBOM).read_text("utf-8")
    for secret in (str(Path(rx_edge.__file__).parents[1]), str(tmp_path)):
        assert secret not in text
    assert text.count("://") == 1  # the schema's own address


def test_a_package_that_is_not_installed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'no-such-package' is not installed"):
        written(tmp_path / sbom.SBOM, packages=("no-such-package",))
    assert not (tmp_path / sbom.SBOM).exists()


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cyclonedx", None)
    with pytest.raises(MissingExtraError, match=r"rx-edge\[export\]"):
        written(tmp_path / sbom.SBOM)
