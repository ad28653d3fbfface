"""The llama.cpp backend against transformers in float32, and everything it must refuse."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from rx_edge.backends import gguf_engine, llm_gguf, registry
from rx_edge.backends.gguf_engine import OUTPUTS
from rx_edge.backends.llm_gguf import BATCH, GgufLanguage
from rx_edge.errors import BackendError
from rx_edge_export import llm_gguf as writer
from tests.factories import tiny_llama_dir

TOLERANCE = 1e-3  # float32 on both sides; about 1e-5 is reached
N_CTX = 1024


class Model:
    """A tiny Llama as transformers sees it, and its GGUF."""

    def __init__(self, root: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.directory = tiny_llama_dir(root / "hf")
        self.gguf = root / "tiny.gguf"
        writer.write(self.directory, self.gguf, dtype="f32", name="tiny")
        self.torch: Any = AutoModelForCausalLM.from_pretrained(self.directory).eval()
        self.tokenizer = Tokenizer.from_file(str(self.directory / "tokenizer.json"))
        self.table = self.torch.get_input_embeddings().weight.detach().numpy()

    def ids(self, text: str) -> Any:
        return np.asarray(self.tokenizer.encode(text).ids, np.int32)

    def reference(self, *segments: Any) -> Any:
        """transformers' logits (T, V) of the concatenated segments."""
        rows = [self.table[s] if s.ndim == 1 else s for s in segments]
        with torch.no_grad():
            embeddings = torch.from_numpy(np.concatenate(rows))[None]
            return self.torch(inputs_embeds=embeddings).logits[0].numpy()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def backend(model: Model) -> Iterator[GgufLanguage]:
    with llm_gguf.open(model.gguf, n_ctx=N_CTX, threads=1, exact=True) as opened:
        yield opened


def soft_prompt(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(0, 0.2, (n, 64)).astype(np.float32)


def prompt(model: Model) -> list[Any]:
    before = model.ids("<|im_start|>user\nWrite the findings<img>")
    return [before, soft_prompt(9), model.ids("</img><|im_end|>\nThe heart")]


def distance(a: Any, b: Any) -> float:
    return float(np.abs(a - b).max())


def test_text_soft_prompt_text_equals_transformers(model: Model, backend: GgufLanguage) -> None:
    segments = prompt(model)
    wanted = model.reference(*segments)
    assert wanted.std() > 1  # else the tolerance would say nothing
    assert distance(backend.prefill(segments), wanted[-1]) < TOLERANCE
    assert backend.position == sum(map(len, segments))
    assert (backend.n_vocab, backend.n_embd) == model.table.shape
    assert backend.device == "cpu"


def test_production_settings_are_close(model: Model) -> None:
    segments = prompt(model)
    with llm_gguf.open(model.gguf, n_ctx=N_CTX, threads=1) as backend:
        assert distance(backend.prefill(segments), model.reference(*segments)[-1]) < 0.1


def test_verify_pass_equals_single_steps(model: Model, backend: GgufLanguage) -> None:
    segments, draft = prompt(model), model.ids(" size is normal. Lungs are clear.")
    backend.prefill(segments)
    start = backend.position
    wide = backend.step(draft)
    backend.rewind(start)
    single = np.concatenate([backend.step(draft[i : i + 1]) for i in range(len(draft))])
    assert wide.shape == (len(draft), backend.n_vocab)
    assert distance(wide, single) < TOLERANCE
    assert distance(wide, model.reference(*segments, draft)[-len(draft) :]) < TOLERANCE


def test_rewind_forgets_what_followed(model: Model, backend: GgufLanguage) -> None:
    before, soft, after = prompt(model)
    wanted = backend.prefill([before, soft, after])
    backend.rewind(len(before))
    assert backend.position == len(before)
    other = backend.prefill([soft_prompt(9, seed=1), after])
    backend.rewind(len(before))
    again = backend.prefill([soft, after])
    assert distance(other, wanted) > 0.1
    assert distance(again, wanted) < 1e-5


@pytest.mark.parametrize("position", [-1, 6])
def test_rewind_refuses_what_is_not_there(backend: GgufLanguage, position: int) -> None:
    backend.step(np.arange(5, dtype=np.int32))
    with pytest.raises(BackendError, match=f"rewind to {position}.*holds 5"):
        backend.rewind(position)


def test_more_than_a_batch_is_split(model: Model, backend: GgufLanguage) -> None:
    soft, text = soft_prompt(BATCH + 30), model.ids("The lungs are clear")
    wanted = model.reference(soft, text)[-1]
    assert distance(backend.prefill([soft, text]), wanted) < TOLERANCE


def test_more_ids_than_output_rows_are_split(model: Model, backend: GgufLanguage) -> None:
    ids = np.tile(model.ids("The lungs are clear. "), 20)[: 2 * OUTPUTS + 3]
    assert distance(backend.step(ids), model.reference(ids)) < TOLERANCE


def test_full_context_is_refused_before_decoding(model: Model) -> None:
    with llm_gguf.open(model.gguf, n_ctx=32, threads=1, exact=True) as backend:
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
    model: Model, backend: GgufLanguage, segment: Any, message: str
) -> None:
    backend.prefill([model.ids("The heart")])
    before = backend.position
    with pytest.raises(BackendError, match=message):
        backend.prefill([segment])
    assert backend.position == before


def test_nonfinite_logits_are_an_error(model: Model, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.gguf.read_bytes())
    for tensor in gguf.GGUFReader(broken, "r+").tensors:
        if tensor.name == "blk.1.ffn_down.weight":
            tensor.data[3, 5] = np.nan
    with llm_gguf.open(broken, n_ctx=64, threads=1) as backend:
        for call in (backend.step, lambda ids: backend.prefill([ids, soft_prompt(2)])):
            with pytest.raises(BackendError, match="NaN or infinite logits"):
                call(model.ids("The heart"))
            assert backend.position == 0


def test_engine_failure_is_reported_and_undone(
    model: Model, backend: GgufLanguage, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = prompt(model)
    wanted = backend.prefill(segments)
    monkeypatch.setattr(backend, "_position", backend.position + 3)  # a gap in the sequence
    with pytest.raises(BackendError, match=r"returned -1 for 1 tokens at \d+: .*consecutive"):
        backend.step(model.ids("The")[:1])
    backend.rewind(0)
    assert distance(backend.prefill(segments), wanted) < 1e-5


AWKWARD = (
    "",
    " ",
    "  two  spaces\n\n\tand tabs ",
    "4.5 cm x 12mm in 2024, L1-L5",
    "don't, can't, we'll; O'Brien's",
    "<img></img> <|im_start|>user\n<|im_end|> <|im_end",
    "naïve façade \u2013 “quotes” … µm ±½ ≥3",
    "心臓は正常 🫁🫀 \u200b\u00a0",
    "e\u0301 combining, \r\n CRLF",
)


@pytest.mark.parametrize("text", AWKWARD)
def test_tokenizer_inside_the_gguf_equals_the_trained_one(
    model: Model, backend: GgufLanguage, text: str
) -> None:
    assert backend.tokenize(text) == model.tokenizer.encode(text, add_special_tokens=False).ids


def test_closed_backend_refuses(model: Model) -> None:
    backend = llm_gguf.open(model.gguf, n_ctx=32, threads=1)
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


def test_open_refuses(model: Model, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"missing\.gguf.*No such file"):
        llm_gguf.open(tmp_path / "missing.gguf", n_ctx=32, threads=1)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"not a model")
    with pytest.raises(BackendError, match="not a GGUF"):
        llm_gguf.open(other, n_ctx=32, threads=1)
    other.write_bytes(model.gguf.read_bytes()[:100_000])
    with pytest.raises(BackendError, match=r"cannot load .*other\.gguf': \w+"):
        llm_gguf.open(other, n_ctx=32, threads=1)
    with pytest.raises(BackendError, match="n_ctx is 4096 but the model was trained for 2048"):
        llm_gguf.open(model.gguf, n_ctx=4096, threads=1)
    with pytest.raises(BackendError, match="n_ctx is 0"):
        llm_gguf.open(model.gguf, n_ctx=0, threads=1)


def test_llama_cpp_prints_nothing(model: Model, capfd: pytest.CaptureFixture[str]) -> None:
    with llm_gguf.open(model.gguf, n_ctx=32, threads=0) as backend:
        backend.step(np.arange(3, dtype=np.int32))
    assert capfd.readouterr() == ("", "")


def test_registry_finds_and_describes_backends() -> None:
    assert registry.load("llm_gguf") is llm_gguf
    reasons = registry.describe()
    assert reasons.keys() == registry.BACKENDS.keys()
    assert [reasons[n] for n in ("vision_onnx", "llm_gguf", "llm_onnx")] == [None] * 3
    with pytest.raises(BackendError, match="did you mean 'llm_gguf'"):
        registry.load("llm_ggml")


def test_missing_engine_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("llama_cpp", "onnxruntime"):
        for name in [m for m in sys.modules if m.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)  # what `import` takes for "not there"
    gguf_engine.engine.cache_clear()
    reasons = registry.describe()
    assert set(reasons) == set(registry.BACKENDS)
    for name, reason in reasons.items():  # TensorRT may be installed and lack its GPU
        assert reason is not None
        assert "pip install" in reason or name == "vision_tensorrt", reason
