"""The ONNX language backend against transformers and llama.cpp, and everything it must refuse."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from rx_edge.backends import llm_gguf, llm_onnx, onnx_engine
from rx_edge.backends.base import PAIRING_KEY
from rx_edge.backends.llm_onnx import BATCH, STALE, OnnxLanguage, sidecars
from rx_edge.errors import BackendError
from rx_edge_export import llm_gguf as gguf_writer
from rx_edge_export import llm_onnx as writer
from tests.factories import tiny_llama_dir

TOLERANCE = 1e-3  # relative to the largest logit; about 1e-6 is reached
N_CTX = 1024
PAIRING = "a" * 64


class Model:
    """A tiny Llama as transformers sees it, its ONNX file and its GGUF."""

    def __init__(self, root: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.directory = tiny_llama_dir(root / "hf")
        self.onnx = root / "llm.fp32.onnx"
        self.gguf = root / "llm.F32.gguf"
        writer.write(self.directory, self.onnx, precision="fp32", pairing=PAIRING)
        gguf_writer.write(self.directory, self.gguf, dtype="f32", name="tiny")
        shutil.copyfile(self.directory / "tokenizer.json", root / "tokenizer.json")
        self.torch: Any = AutoModelForCausalLM.from_pretrained(self.directory).eval()
        self.tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
        self.table = self.torch.get_input_embeddings().weight.detach().numpy()

    def ids(self, text: str) -> Any:
        return np.asarray(self.tokenizer.encode(text).ids, np.int32)

    def reference(self, *segments: Any) -> Any:
        """transformers' logits (T, V) of the concatenated segments."""
        rows = [self.table[s] if s.ndim == 1 else s for s in segments]
        with torch.no_grad():
            embeddings = torch.from_numpy(np.concatenate(rows))[None]
            return self.torch(inputs_embeds=embeddings).logits[0].numpy()

    def copy(self, directory: Path) -> Path:
        """The three files, for a test that damages them."""
        for file in (self.onnx, *sidecars(self.onnx)):
            shutil.copyfile(file, directory / file.name)
        return directory / self.onnx.name


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def backend(model: Model) -> Iterator[OnnxLanguage]:
    with llm_onnx.open(model.onnx, n_ctx=N_CTX, threads=1) as opened:
        yield opened


def soft_prompt(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(0, 0.2, (n, 64)).astype(np.float32)


def prompt(model: Model) -> list[Any]:
    before = model.ids("<|im_start|>user\nWrite the findings<img>")
    return [before, soft_prompt(9), model.ids("</img><|im_end|>\nThe heart")]


def distance(found: Any, wanted: Any) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_text_soft_prompt_text_equals_transformers(model: Model, backend: OnnxLanguage) -> None:
    segments = prompt(model)
    wanted = model.reference(*segments)
    assert wanted.std() > 1  # else the tolerance would say nothing
    assert distance(backend.prefill(segments), wanted[-1]) < TOLERANCE
    assert backend.position == sum(map(len, segments))
    assert (backend.n_vocab, backend.n_embd) == model.table.shape
    assert (backend.device, backend.pairing) == ("cpu", PAIRING)


def test_onnx_and_gguf_agree_in_every_call(model: Model, backend: OnnxLanguage) -> None:
    segments, draft = prompt(model), model.ids(" size is normal. Lungs are clear.")
    keep = sum(map(len, segments)) + 2
    with llm_gguf.open(model.gguf, n_ctx=N_CTX, threads=1, exact=True) as other:
        calls: list[Any] = [
            lambda b: b.prefill(segments),
            lambda b: b.step(draft[:1]),
            lambda b: b.step(draft),
            lambda b: (b.rewind(keep), b.step(draft[3:5]))[1],
            lambda b: b.prefill([soft_prompt(3, seed=1), draft[:2]]),
        ]
        for call in calls:
            assert distance(call(backend), call(other)) < TOLERANCE
            assert backend.position == other.position


def test_verify_pass_equals_single_steps(model: Model, backend: OnnxLanguage) -> None:
    segments, draft = prompt(model), model.ids(" size is normal. Lungs are clear.")
    backend.prefill(segments)
    start = backend.position
    wide = backend.step(draft)
    backend.rewind(start)
    single = np.concatenate([backend.step(draft[i : i + 1]) for i in range(len(draft))])
    assert wide.shape == (len(draft), backend.n_vocab)
    assert wide.dtype == np.float32
    assert distance(wide, single) < TOLERANCE
    assert distance(wide, model.reference(*segments, draft)[-len(draft) :]) < TOLERANCE


def test_rewind_forgets_what_followed(model: Model, backend: OnnxLanguage) -> None:
    before, soft, after = prompt(model)
    wanted = backend.prefill([before, soft, after])
    backend.rewind(len(before))
    assert backend.position == len(before)
    other = backend.prefill([soft_prompt(9, seed=1), after])
    backend.rewind(len(before))
    again = backend.prefill([soft, after])
    assert distance(other, wanted) > 0.1
    assert distance(again, wanted) < 1e-5


def test_many_rewinds_stay_exact_and_bounded(model: Model, backend: OnnxLanguage) -> None:
    """Drafts of 8 of which 3 are kept: hidden slots lie between used ones, then are removed."""
    ids = np.tile(model.ids("The lungs are clear. "), 12)[:96]
    sizes = []
    for first in range(0, 84, 3):
        found = backend.step(ids[first : first + 8])
        backend.rewind(first + 3)
        sizes.append(next(iter(backend._cache.values())).shape()[2] - backend.position)
    assert distance(found, model.reference(ids[:89])[-8:]) < TOLERANCE
    assert max(sizes) <= STALE
    assert sizes.count(0) >= 1  # compacted at least once
    backend.rewind(0)
    assert distance(backend.step(ids[:4]), model.reference(ids[:4])) < TOLERANCE


@pytest.mark.parametrize("position", [-1, 6])
def test_rewind_refuses_what_is_not_there(backend: OnnxLanguage, position: int) -> None:
    backend.step(np.arange(5, dtype=np.int32))
    with pytest.raises(BackendError, match=f"rewind to {position}.*holds 5"):
        backend.rewind(position)


def test_more_than_a_batch_is_split(model: Model, backend: OnnxLanguage) -> None:
    soft, text = soft_prompt(BATCH + 30), model.ids("The lungs are clear")
    wanted = model.reference(soft, text)
    assert distance(backend.prefill([soft, text]), wanted[-1]) < TOLERANCE
    ids = np.tile(text, 90)[: BATCH + 3]
    backend.rewind(0)
    assert distance(backend.step(ids), model.reference(ids)) < TOLERANCE


def test_full_context_is_refused_before_decoding(model: Model) -> None:
    with llm_onnx.open(model.onnx, n_ctx=32, threads=1) as backend:
        backend.prefill([np.arange(30, dtype=np.int32)])
        with pytest.raises(BackendError, match=r"30 tokens \+ 3 more exceed n_ctx 32"):
            backend.prefill([np.arange(1, dtype=np.int32), soft_prompt(2)])
        assert backend.position == 30
        assert backend.step(np.arange(2, dtype=np.int32)).shape == (2, backend.n_vocab)


def bad_segments() -> list[Any]:
    nan, infinite = soft_prompt(3), soft_prompt(3)
    nan[1, 1], infinite[2, 0] = np.nan, np.inf
    return [
        pytest.param(nan, "NaN", id="nan"),
        pytest.param(infinite, "NaN or infinite", id="inf"),
        pytest.param(soft_prompt(3)[:, :63], r"\(N, 64\) is expected", id="width"),
        pytest.param(soft_prompt(3).astype(np.float64), "float32 is expected", id="float64"),
        pytest.param(soft_prompt(3)[None], r"\(1, 3, 64\)", id="rank"),
        pytest.param(np.array([1, -1], np.int32), "from -1 to 1", id="negative"),
        pytest.param(np.array([1, 999_999], np.int32), "to 999999", id="too-large"),
        pytest.param(np.array([1.0, 2.0], np.float32), "integers", id="float-ids"),
        pytest.param(np.array([], np.int32), "nothing to decode", id="empty"),
    ]


@pytest.mark.parametrize(("segment", "message"), bad_segments())
def test_bad_input_is_refused(
    model: Model, backend: OnnxLanguage, segment: Any, message: str
) -> None:
    backend.prefill([model.ids("The heart")])
    before = backend.position
    with pytest.raises(BackendError, match=message):
        backend.prefill([segment])
    assert backend.position == before


def test_nonfinite_logits_are_an_error(model: Model, tmp_path: Path) -> None:
    broken = model.copy(tmp_path)
    table = sidecars(broken)[1]
    embeddings = load_file(table)[llm_onnx.TABLE]
    text = model.ids("The heart")
    embeddings[text[-1]] = np.nan
    save_file({llm_onnx.TABLE: embeddings}, table, metadata={PAIRING_KEY: PAIRING})
    with llm_onnx.open(broken, n_ctx=64, threads=1) as backend:
        wanted = backend.step(text[:1])
        backend.rewind(0)
        for call in (backend.step, lambda ids: backend.prefill([ids, soft_prompt(2)])):
            with pytest.raises(BackendError, match="NaN or infinite logits"):
                call(text)
            assert backend.position == 0
        assert distance(backend.step(text[:1]), wanted) < 1e-6  # the cache is as it was


def test_engine_failure_is_reported_and_undone(
    model: Model, backend: OnnxLanguage, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = prompt(model)
    backend.prefill(segments)
    start, wanted = backend.position, backend.step(model.ids("The"))
    backend.rewind(start)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "_visible", np.ones(3, np.int64))  # a mask of another length
        with pytest.raises(BackendError, match=f"failed on 2 tokens at {start}: "):
            backend.step(model.ids("The")[:1].repeat(2))
    assert backend.position == start
    assert distance(backend.step(model.ids("The")), wanted) < 1e-5


def test_a_failing_chunk_takes_back_the_chunks_before(
    model: Model, backend: OnnxLanguage, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = backend.prefill(prompt(model))
    run, start = backend._run, backend.position
    calls = []

    def second_fails(rows: Any) -> Any:
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(rows)

    monkeypatch.setattr(backend, "_run", second_fails)
    with pytest.raises(KeyboardInterrupt):
        backend.prefill([soft_prompt(BATCH + 1)])
    assert (backend.position, calls) == (start, [BATCH, 1])
    backend.rewind(0)
    assert distance(backend.prefill(prompt(model)), wanted) < 1e-5


def test_tokenizer_beside_the_graph(model: Model, backend: OnnxLanguage, tmp_path: Path) -> None:
    for text in ("", "  two  spaces\n", "<img></img> <|im_start|>user", "µm ≥3 心臓"):
        wanted = model.tokenizer.encode(text, add_special_tokens=False).ids
        assert backend.tokenize(text) == wanted
    with (
        llm_onnx.open(model.copy(tmp_path), n_ctx=32, threads=1) as lonely,
        pytest.raises(BackendError, match=r"tokenizer\.json' cannot be read"),
    ):
        lonely.tokenize("a")


def test_closed_backend_refuses(model: Model) -> None:
    backend = llm_onnx.open(model.onnx, n_ctx=32, threads=1)
    backend.close()
    backend.close()
    for call in (
        lambda: backend.prefill([soft_prompt(1)]),
        lambda: backend.step(np.arange(1, dtype=np.int32)),
        lambda: backend.rewind(0),
        lambda: backend.tokenize("a"),
    ):
        with pytest.raises(BackendError, match="closed"):
            call()


def test_open_refuses_settings(model: Model) -> None:
    with pytest.raises(BackendError, match="n_ctx is 4096 but the model was trained for 2048"):
        llm_onnx.open(model.onnx, n_ctx=4096, threads=1)
    with pytest.raises(BackendError, match="n_ctx is 0"):
        llm_onnx.open(model.onnx, n_ctx=0, threads=1)
    with pytest.raises(BackendError, match="threads is -1"):
        llm_onnx.open(model.onnx, n_ctx=32, threads=-1)
    with pytest.raises(BackendError, match="device is 'tpu'.*cpu, cuda"):
        llm_onnx.open(model.onnx, n_ctx=32, threads=1, device="tpu")
    with pytest.raises(BackendError, match=r"no CUDAExecutionProvider.*rx-edge\[gpu\]"):
        llm_onnx.open(model.onnx, n_ctx=32, threads=1, device="cuda")


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_open_names_the_missing_file(model: Model, tmp_path: Path, lost: int) -> None:
    path = model.copy(tmp_path)
    file = [path, *sidecars(path)][lost]
    file.unlink()
    with pytest.raises(BackendError, match=f"{file.name}' does not exist"):
        llm_onnx.open(path, n_ctx=32, threads=1)


def test_open_refuses_damaged_files(model: Model, tmp_path: Path) -> None:
    path = model.copy(tmp_path)
    weights, table = sidecars(path)
    table.write_bytes(table.read_bytes()[:100])
    with pytest.raises(BackendError, match=r"embedding table .*embed\.safetensors' cannot be read"):
        llm_onnx.open(path, n_ctx=32, threads=1)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(BackendError, match="onnxruntime cannot load"):
        llm_onnx.open(path, n_ctx=32, threads=1)
    path.write_bytes(b"not a model")
    with pytest.raises(BackendError, match="onnxruntime cannot load"):
        llm_onnx.open(path, n_ctx=32, threads=1)


@pytest.mark.parametrize(
    ("table", "pairing", "message"),
    [
        (np.zeros((384, 63), np.float32), PAIRING, r"F32 \[384, 63\].*different models"),
        (np.zeros((384, 64), np.int32), PAIRING, r"I32 \[384, 64\].*different models"),
        (np.zeros((384, 64), np.float32), "b" * 64, "has pairing 'bbb.*'aaa"),
    ],
)
def test_table_of_another_model_is_refused(
    model: Model, tmp_path: Path, table: Any, pairing: str, message: str
) -> None:
    path = model.copy(tmp_path)
    save_file({llm_onnx.TABLE: table}, sidecars(path)[1], metadata={PAIRING_KEY: pairing})
    with pytest.raises(BackendError, match=message):
        llm_onnx.open(path, n_ctx=32, threads=1)


def edit(path: Path, change: Any) -> None:
    graph = onnx.load(path, load_external_data=False)
    change(graph)
    path.write_bytes(graph.SerializeToString())


def rename(graph: Any) -> None:
    graph.graph.input[2].name = "token_type_ids"
    for node in graph.graph.node:
        node.input[:] = ["token_type_ids" if n == "position_ids" else n for n in node.input]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, "token_type_ids.*export it again"),
        (lambda g: g.metadata_props.clear(), "does not say how many tokens.*export it again"),
        (
            lambda g: g.graph.input[0].type.tensor_type.shape.dim[0].__setattr__("dim_value", 1),
            "fixes their sizes",
        ),
    ],
)
def test_other_graphs_are_refused(model: Model, tmp_path: Path, change: Any, message: str) -> None:
    path = model.copy(tmp_path)
    edit(path, change)
    with pytest.raises(BackendError, match=message):
        llm_onnx.open(path, n_ctx=32, threads=1)


def test_a_provider_that_does_not_load_is_an_error(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ort = onnx_engine.engine()
    monkeypatch.setattr(
        ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    real = ort.InferenceSession

    def on_the_cpu(path: str, options: Any, providers: Any) -> Any:
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", on_the_cpu)
    with pytest.raises(BackendError, match="asked for CUDA.*but uses CPUExecutionProvider"):
        llm_onnx.open(model.onnx, n_ctx=32, threads=1, exact=True, device="cuda")


def test_onnxruntime_prints_nothing(model: Model, capfd: pytest.CaptureFixture[str]) -> None:
    with llm_onnx.open(model.onnx, n_ctx=32, threads=0, exact=True) as backend:
        backend.step(np.arange(3, dtype=np.int32))
    assert capfd.readouterr() == ("", "")
    assert llm_onnx.is_available() is None
