"""Float GGUF -> quantised GGUF: the promised type, the real types, and the importance matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from rx_edge.backends import llm_gguf as reader
from rx_edge.errors import ExportError
from rx_edge_export import llm_gguf as writer
from rx_edge_export.gguf_quantize import FILE_TYPES, quantize
from tests.export.gguf_helpers import export, gguf_logits, torch_logits
from tests.factories import tiny_gpt2_dir, tiny_llama_dir


def test_q8_0_is_close_and_reports_real_types(llama: Path, tmp_path: Path) -> None:
    export(llama, tmp_path / "a.gguf")
    summary = quantize(tmp_path / "a.gguf", tmp_path / "q.gguf", file_type="Q8_0", threads=1)
    assert summary["tensor_types"] == {"F32": 5, "Q8_0": 15}
    assert summary["bytes"] < (tmp_path / "a.gguf").stat().st_size / 2
    wanted, found = torch_logits(llama), gguf_logits(tmp_path / "q.gguf")
    assert 1e-3 < np.abs(found - wanted).mean() < 0.1 * wanted.std()


def test_rows_that_fit_no_block_are_visible(tmp_path: Path) -> None:
    directory = tiny_llama_dir(tmp_path / "hf", intermediate_size=72)  # not a multiple of 32
    export(directory, tmp_path / "a.gguf")
    summary = quantize(tmp_path / "a.gguf", tmp_path / "q.gguf", file_type="Q8_0", threads=1)
    assert summary["tensor_types"] == {"F16": 2, "F32": 5, "Q8_0": 13}


def test_quantize_reports_llama_cpps_reason(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not exist"):
        quantize(tmp_path / "a", tmp_path / "q", file_type="Q8_0", threads=1)
    (tmp_path / "a").write_bytes(b"GGUF but not really")
    with pytest.raises(ExportError, match="file_type is 'Q4_0'; valid: 'Q8_0'"):
        quantize(tmp_path / "a", tmp_path / "q", file_type="Q4_0", threads=1)
    with pytest.raises(ExportError, match=r"could not quantise .* to Q8_0: \w+"):
        quantize(tmp_path / "a", tmp_path / "q", file_type="Q8_0", threads=1)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_pairing_survives_quantisation(llama: Path, tmp_path: Path) -> None:
    full, small, none = (tmp_path / name for name in ("a.gguf", "q.gguf", "none.gguf"))
    writer.write(llama, full, dtype="f32", name="tiny", pairing="a" * 64)
    quantize(full, small, file_type="Q8_0", threads=1)
    export(llama, none)
    for path, wanted in ((full, "a" * 64), (small, "a" * 64), (none, "")):
        with reader.open(path, n_ctx=32, threads=1) as backend:
            assert backend.pairing == wanted


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256, which k-quants need; a float32 GGUF."""
    root = tmp_path_factory.mktemp("wide")
    directory = tiny_llama_dir(root / "hf", hidden_size=256, intermediate_size=512)
    export(directory, root / "wide.gguf")
    return root / "wide.gguf"


def test_fewer_bits_are_smaller_and_further_away(wide: Path, tmp_path: Path) -> None:
    wanted = gguf_logits(wide)
    sizes, errors = [], []
    for file_type in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M"):
        out = tmp_path / f"{file_type}.gguf"
        summary = quantize(wide, out, file_type=file_type, threads=1)
        assert any(t.startswith(file_type[:4]) for t in summary["tensor_types"]), summary
        sizes.append(summary["bytes"])
        errors.append(float(np.abs(gguf_logits(out) - wanted).mean()))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)


def test_every_file_type_of_both_families_runs(tmp_path: Path) -> None:
    for name, make in (("llama", tiny_llama_dir), ("gpt2", tiny_gpt2_dir)):
        directory: Path = make(tmp_path / name)
        export(directory, tmp_path / f"{name}.gguf")
        wanted = torch_logits(directory)
        for file_type in FILE_TYPES:
            out = tmp_path / "q.gguf"
            quantize(tmp_path / f"{name}.gguf", out, file_type=file_type, threads=1)
            assert np.abs(gguf_logits(out) - wanted).mean() < 0.3 * wanted.std()


def test_q5_k_m_never_falls_back_to_q5_1(tmp_path: Path) -> None:
    """Rows of 64 fit no block of 256; Q5_1 made a real model repeat itself."""
    directory = tiny_llama_dir(tmp_path / "hf")
    export(directory, tmp_path / "a.gguf")
    found = quantize(tmp_path / "a.gguf", tmp_path / "q.gguf", file_type="Q5_K_M", threads=1)
    assert found["tensor_types"] == {"F32": 5, "Q8_0": 15}


def importance(path: Path, value: float = 1.0) -> dict[str, Any]:
    return {
        t.name: np.full(int(t.shape[0]), value, np.float32)
        for t in gguf.GGUFReader(path).tensors
        if t.name.startswith("blk.") and len(t.shape) == 2
    }


def test_important_columns_are_kept_better(wide: Path, tmp_path: Path) -> None:
    """Error of a matrix, weighted by the importance, is what the importance matrix minimises."""
    weights = importance(wide)
    name = "blk.0.ffn_up.weight"
    weights[name][:] = np.where(np.arange(256) % 32 == 0, 1e4, 1e-3)

    def error(out: Path, imatrix: Any) -> float:
        quantize(wide, out, file_type="Q4_K_M", threads=1, imatrix=imatrix)
        found = {t.name: t for t in gguf.GGUFReader(out).tensors}[name]
        wanted = {t.name: t for t in gguf.GGUFReader(wide).tensors}[name]
        difference = gguf.dequantize(found.data, found.tensor_type) - wanted.data
        return float((difference**2 * weights[name]).sum())

    assert error(tmp_path / "a.gguf", weights) < 0.8 * error(tmp_path / "b.gguf", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update({"blk.9.attn_q.weight": np.ones(64, np.float32)}), "no such tensor"),
        (lambda m: m.update({"blk.0.attn_q.weight": np.ones(63, np.float32)}), "63 columns"),
        (lambda m: m["blk.0.attn_q.weight"].fill(np.nan), "NaN, negative or only zeros"),
        (lambda m: m["blk.0.attn_q.weight"].fill(-1.0), "NaN, negative or only zeros"),
        (lambda m: m["blk.0.attn_q.weight"].fill(0.0), "NaN, negative or only zeros"),
    ],
)
def test_a_wrong_importance_matrix_is_refused(
    llama: Path, tmp_path: Path, change: Any, message: str
) -> None:
    export(llama, tmp_path / "a.gguf")
    imatrix = importance(tmp_path / "a.gguf")
    change(imatrix)
    with pytest.raises(ExportError, match=message):
        quantize(
            tmp_path / "a.gguf", tmp_path / "q", file_type="Q4_K_M", threads=1, imatrix=imatrix
        )
    assert not (tmp_path / "q").exists()
