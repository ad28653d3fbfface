"""Carried packages are put where every step finds them; then, what is here and what is missing.

Pieces are files of a directory: wheels; sdists, built here (llama.cpp with CUDA for this GPU);
`.tar.xz` of ready trees, unpacked onto the path. A file that was cut (`split -b 60m`: NAME.aa,
NAME.ab ...) is joined first. pip never goes on line.

Does not cover: drivers, CUDA itself, and packages of the machine's own, which are left as they are.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from rx_edge.atomic import replacing
from rx_edge.errors import BackendError
from rx_edge.machine import physical_cores
from rx_edge.nvidia import Driver, driver
from rx_edge.runtime.doctor import examine
from rx_edge_bench.gpu.plan import Job, pieces

# module: its distribution
PACKAGES = {
    "numpy": "numpy", "llama_cpp": "llama_cpp_python", "gguf": "gguf", "torch": "torch",
    "safetensors": "safetensors", "tokenizers": "tokenizers", "transformers": "transformers",
    "onnx": "onnx", "onnx_ir": "onnx-ir", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime",
    "peft": "peft", "accelerate": "accelerate", "pydicom": "pydicom", "PIL": "pillow",
    "diskcache": "diskcache", "jinja2": "Jinja2", "yaml": "PyYAML", "tqdm": "tqdm",
}  # fmt: skip
SOURCE_ONLY = "llama_cpp_python"
CONSTRAINTS = Path(__file__).resolve().parents[3] / "constraints.txt"
TRIMMED = (
    "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF "
    "-DLLAMA_BUILD_SERVER=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_CURL=OFF -DGGML_NATIVE=OFF"
)
_PART = re.compile(r"(.+)\.[a-z]{2}")  # what `split` appends
_CUDA = "-DGGML_CUDA=ON -DGGML_CUDA_NCCL=OFF -DCMAKE_CUDA_ARCHITECTURES={}-real"


def run(job: Job) -> dict[str, Any]:
    """Install the pieces that are not installed yet.

    Raises:
        BackendError: pip refuses a piece, or it is of no known kind.
    """
    installed = [_installed(job, piece) for piece in _whole_pieces(job)]
    return {
        "installed": [marker.name for marker in installed],
        "files": {str(marker.relative_to(job.out)): 0 for marker in installed},
        "line": f"{len(installed)} pieces" if job.pieces else "no --pieces: nothing to install",
    }


def doctor(_: Job) -> dict[str, Any]:
    """What is here and what is missing, each with the commands that bring it."""
    missing = {module: how for module in PACKAGES if (how := _missing(module))}
    here = [package for module, package in PACKAGES.items() if module not in missing]
    findings = [asdict(finding) for finding in examine()]
    troubled = [f["subject"] for f in findings if f["fix"]]
    return {
        "packages": {package: _version(package) for package in here},
        "missing": missing,
        "doctor": findings,
        "line": f"missing: {', '.join(missing) or 'nothing'}; "
        f"advice on: {', '.join(troubled) or 'nothing'}",
    }


def _version(package: str) -> str | None:
    names = (package, f"{package}-gpu")
    return next((d.version for n in names for d in metadata.distributions(name=n)), None)


def _missing(module: str) -> str:
    """The commands that bring an absent module; "" where it can be imported."""
    if importlib.util.find_spec(module):
        return ""
    package = PACKAGES[module]
    pins = re.findall(r"^[\w.-]+==\S+$", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    pinned = next((p for p in pins if p.partition("==")[0] == package), package)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    form = (
        f"--no-binary {package}" if package == SOURCE_ONLY else
        f"--only-binary :all: --python-version {version}"
    )  # fmt: skip
    return f"pip download --no-deps {form} {pinned}, cut it (split -b 60m), carry it as --pieces"


def _whole_pieces(job: Job) -> Iterator[Path]:
    """Every piece; cut ones joined. Wheels first: a build may need them."""
    whole, parts = [], dict[str, list[Path]]()
    for piece in pieces(job):
        if cut := _PART.fullmatch(piece.name) if piece.suffix not in (".gz", ".xz") else None:
            parts.setdefault(cut[1], []).append(piece)
        else:
            whole.append(piece)
    for name, cut_into in parts.items():
        joined = job.out / "joined" / name
        if not joined.is_file():
            joined.parent.mkdir(parents=True, exist_ok=True)
            with replacing(joined) as part, part.open("wb") as out:
                for piece in cut_into:
                    out.write(piece.read_bytes())
        whole.append(joined)
    yield from sorted(whole, key=lambda p: (p.suffix != ".whl", p.name))


def _installed(job: Job, piece: Path) -> Path:
    """Install it where it is not yet; the empty file that says that it is."""
    marker = job.site / ".installed" / f"{piece.name}.{piece.stat().st_size}"
    if marker.is_file():
        return marker
    marker.parent.mkdir(parents=True, exist_ok=True)
    if piece.suffix == ".xz":
        with tarfile.open(piece) as archive:
            archive.extractall(job.site, filter="data")
    elif piece.suffix == ".whl" or piece.name.endswith(".tar.gz"):
        _pip(job, piece)
    else:
        raise BackendError(
            f"piece {piece.name!r} is none of: a wheel, an sdist (.tar.gz), a ready tree (.tar.xz)"
        )
    marker.touch()
    return marker


def _pip(job: Job, piece: Path) -> None:
    links = [f"--find-links={p}" for p in (job.pieces, job.out / "joined") if p and p.is_dir()]
    command = [
        sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-index",
        *links, "--no-deps", "--upgrade", "--target", str(job.site), str(piece),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "CMAKE_ARGS": cmake_arguments(),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(physical_cores()),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        raise BackendError(
            f"pip cannot install {piece.name!r}: {(lines or ['no reason given'])[0].strip()}; "
            f"by hand: CMAKE_ARGS={shlex.quote(cmake_arguments())} pip install --no-index"
        )


def cmake_arguments() -> str:
    """Of llama.cpp's build: for the GPU that is here, or without CUDA."""
    found = driver()
    if not isinstance(found, Driver) or not found.gpus:
        return TRIMMED
    return f"{TRIMMED} {_CUDA.format('{}{}'.format(*found.gpus[0].compute_capability))}"
