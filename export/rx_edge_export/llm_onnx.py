"""A merged Hugging Face causal LM -> an ONNX decoder over embeddings, with explicit KV tensors.

torch's exporter traces the model itself, so what config.json says about the arithmetic (rope
scaling, biases, norms) is in the graph without being translated. What a trace cannot hold is
refused: arithmetic that switches with the length of the text. The file is then read back with
the runtime's own backend and compared with the model, loaded anew in float32, over several runs
with a growing past, a rewind and a batch of three.

Three files appear, the graph last: weights, embedding table and graph (`backends.llm_onnx`).
The same directory gives the same bytes: source lines, stack traces and paths are removed.

Does not cover: families other than Llama and GPT-2, sliding windows, fused attention operators,
calibrated quantisation, models larger than memory in float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import torch
from safetensors.numpy import save_file
from torch import nn

from rx_edge.atomic import replacing
from rx_edge.backends import llm_onnx as reader
from rx_edge.backends import onnx_engine
from rx_edge.backends.base import PAIRING_KEY
from rx_edge.errors import BackendError, ExportError
from rx_edge.model.hub import source, transformers
from rx_edge_export.onnx_nbits import histogram, mixed_bits, quantise
from rx_edge_export.onnx_tracing import silence, strip

OPSET = 20
TOLERANCE = 1e-3  # fp32: of the largest reference logit; about 1e-6 is reached
PRECISIONS = ("fp32", "fp16", "int8", "int4")
FAMILIES = ("llama", "gpt2")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # others change with the text's length
_MIN_CONTEXT = 96  # tokens that the comparison needs


@dataclass(frozen=True)
class Part:
    """What a writer hands to `publish`: a graph, its embedding table (V, D), and where from."""

    model: ir.Model
    table: Any
    model_dir: Path
    context: int  # tokens the model was trained for


def write(
    model_dir: Path,
    out: Path,
    *,
    precision: Literal["fp32", "fp16", "int8", "int4"],
    pairing: str = "",
    name: str = "",
    traced: Path | None = None,
) -> dict[str, Any]:
    """Write `model_dir` (config.json, *.safetensors) as `out` and its `sidecars`.

    Args:
        precision: "fp16" is weights and arithmetic; logits and inputs_embeds stay float32.
            "int8" and "int4" are block-wise weights with float32 arithmetic, see `onnx_nbits`.
        pairing: hash of the model this file belongs to (`rx_edge.bundle.pairing_hash`).
        name: the graph's name.
        traced: a file of `save_trace` for the same model, to save the time; fp16 has its own trace.

    Returns:
        {"bytes", "opset", "max_error", "random_kl", "op_types", "embedding_dtype", "files"}:
        the largest logit difference relative to the largest logit and the mean KL in nats, both
        on random embeddings; bytes of all files together.

    Raises:
        ExportError: unknown precision, a model that is not covered or not complete, numbers
            beyond float16, or a result that is not finite or (fp32) differs from torch. `out` is
            then left as it was.
    """
    if precision not in PRECISIONS:
        raise ExportError(f"precision is {precision!r}; valid: {', '.join(map(repr, PRECISIONS))}")
    check_directory(out)
    model = load(model_dir, torch.float16 if precision == "fp16" else torch.float32)
    graph = ir.load(traced) if traced and precision != "fp16" else trace(model)
    if precision in ("int8", "int4"):
        bits_of = mixed_bits(model.config.num_hidden_layers)
        eight = precision == "int8"
        quantise(graph, (lambda _: 8) if eight else bits_of, k_quant=not eight)
    table = embedding_table(model, np.float32 if precision == "fp32" else np.float16)
    part = Part(graph, table, model_dir, model.config.max_position_embeddings)
    del model
    tolerance = TOLERANCE if precision == "fp32" else None
    return publish(part, out, tolerance=tolerance, pairing=pairing, name=name)


def save_trace(model_dir: Path, out: Path) -> dict[str, Any]:
    """Trace once in float32; fp32, int8 and int4 files are then made from `out`."""
    ir.save(trace(load(model_dir, torch.float32)), out, external_data=f"{out.name}.data")
    return {"bytes": out.stat().st_size}


def publish(
    part: Part, out: Path, *, tolerance: float | None, pairing: str, name: str
) -> dict[str, Any]:
    """Save, compare with torch, and only then show the files under their names.

    Args:
        tolerance: largest `max_error`; None = any finite one.
    """
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        staged = Path(scratch) / out.name  # the final name: weights are referred to by it
        op_types = histogram(part.model)
        _save(part, staged, pairing, name)
        onnx.checker.check_model(staged)
        measured = compare(staged, part.model_dir)
        if tolerance is not None and not measured["max_error"] < tolerance:
            raise ExportError(
                f"the ONNX file differs from torch by {measured['max_error']:.1e} of the largest "
                f"logit; {tolerance:.0e} is allowed"
            )
        files = [*reader.sidecars(staged), staged]
        size = sum(file.stat().st_size for file in files)
        # no graph while its weights change, and none without them
        out.unlink(missing_ok=True)
        for file, target in zip(files, [*reader.sidecars(out), out], strict=True):
            with replacing(target) as shown:
                file.replace(shown)
    return {
        "bytes": size,
        "opset": part.model.opset_imports[""],
        **measured,
        "op_types": op_types,
        "embedding_dtype": part.table.dtype.name,
        "files": [file.name for file in files],
    }


def check_directory(out: Path) -> None:
    """Raises: ExportError: there is no directory to write `out` to."""
    if not out.parent.is_dir():
        raise ExportError(f"{str(out.parent)!r} is no directory; create it first")


def load(model_dir: Path, dtype: torch.dtype) -> Any:
    """The model in eval mode, complete and finite, from local safetensors only."""
    if not model_dir.is_dir():
        raise ExportError(f"{str(model_dir)!r} is no directory; save the merged model there first")
    hf = transformers()
    where = source(str(model_dir))
    try:
        config = hf.AutoConfig.from_pretrained(**where)
        _check_config(config, model_dir)
        model, info = hf.AutoModelForCausalLM.from_pretrained(
            **where,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ExportError(f"{str(model_dir)!r} cannot be loaded: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise ExportError(
                f"{str(model_dir)!r}: {len(info[problem])} {problem.replace('_', ' ')} for this "
                f"config.json, e.g. {min(map(str, info[problem]))!r}; save the model again"
            )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ExportError(f"{name} holds NaN, infinity or numbers beyond {dtype}")
    return model.eval()


def _check_config(config: Any, model_dir: Path) -> None:
    if config.model_type not in FAMILIES:
        raise ExportError(
            f"{str(model_dir)!r}: model_type is {config.model_type!r}, but the ONNX writer covers "
            f"only {', '.join(map(repr, FAMILIES))}"
        )
    if getattr(config, "quantization_config", None):
        raise ExportError(f"{str(model_dir)!r} is quantised; export the float model")
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise ExportError(
            f"{str(model_dir)!r}: rope_type is {kind!r}, which may change with the length of the "
            f"text; one trace can hold {', '.join(map(repr, _ROPE_TYPES))}"
        )
    if config.max_position_embeddings < _MIN_CONTEXT:
        raise ExportError(
            f"{str(model_dir)!r}: max_position_embeddings is {config.max_position_embeddings}; "
            f"the comparison with torch needs {_MIN_CONTEXT}"
        )


class _Decoder(nn.Module):
    """The LM with plain tensors in and out instead of a cache object."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.new_cache = transformers().DynamicCache

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        cache = self.new_cache(config=self.model.config)
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        result = self.model(
            inputs_embeds=inputs_embeds.to(self.model.dtype),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [(layer.keys, layer.values) for layer in result.past_key_values.layers]
        return result.logits.float(), present


def trace(model: Any) -> ir.Model:
    """The decoder as a graph; scope names stay in it until it is saved.

    Raises:
        ExportError: torch cannot export it.
    """
    _linearise(model)
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers, kind = config.num_hidden_layers, model.dtype
    rows, new, old = 2, 5, 7  # no size may be 1: torch would take it for a constant
    shape = (rows, heads, old, head_dim)  # torch merges inputs that are the same tensor
    past = [(torch.zeros(shape, dtype=kind), torch.zeros(shape, dtype=kind)) for _ in range(layers)]
    example = (
        torch.zeros(rows, new, config.hidden_size),
        torch.ones(rows, old + new, dtype=torch.int64),
        torch.arange(old, old + new).repeat(rows, 1),
        past,
    )
    batch, seq, before = (torch.export.Dim(name) for name in ("batch", "seq", "past"))
    shapes = {
        reader.EMBEDS: {0: batch, 1: seq},
        reader.MASK: {0: batch, 1: torch.export.Dim.DYNAMIC},
        reader.POSITIONS: {0: batch, 1: seq},
        "past": [({0: batch, 2: before},) * 2 for _ in range(layers)],
    }
    pairs = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    try:
        with silence(), torch.no_grad():
            program = torch.onnx.export(
                _Decoder(model),
                example,
                dynamo=True,
                optimize=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                input_names=[reader.EMBEDS, reader.MASK, reader.POSITIONS]
                + [f"past_key_values.{pair}" for pair in pairs],
                output_names=[reader.LOGITS] + [f"present.{pair}" for pair in pairs],
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds, none documented
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outermost one only says which step failed
            cause = cause.__cause__
        reason = (str(cause).strip() or repr(cause)).splitlines()[0]
        raise ExportError(f"torch.onnx cannot export {type(model).__name__}: {reason}") from error
    assert program is not None  # only with dynamo=False
    return program.model


def _linearise(model: Any) -> None:
    """GPT-2's Conv1D is a transposed Linear; as Linear it exports as MatMul like all others."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ != "Conv1D":
            continue
        rows, columns = module.weight.shape
        linear = nn.Linear(rows, columns, dtype=module.weight.dtype)
        linear.weight = nn.Parameter(module.weight.detach().T.contiguous())
        linear.bias = module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)


def embedding_table(model: Any, dtype: Any) -> Any:
    """The input embeddings (V, D), checked for overflow."""
    weight = model.get_input_embeddings().weight.detach().float().numpy()
    with np.errstate(over="ignore"):  # reported just below
        table = np.ascontiguousarray(weight, dtype=dtype)
    if not np.isfinite(table).all():
        raise ExportError(f"the embedding table holds numbers beyond {table.dtype}")
    return table


def _save(part: Part, path: Path, pairing: str, name: str) -> None:
    model = part.model
    strip(model)
    model.graph.name = name or "llm"
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name == reader.MASK:  # torch invents a name for this length
            value.shape = ir.Shape(["batch", "past + seq"])
    model.metadata_props[reader.CONTEXT_KEY] = str(part.context)
    if pairing:
        model.metadata_props[PAIRING_KEY] = pairing
    weights, table = reader.sidecars(path)
    ir.save(model, path, external_data=weights.name)
    save_file({reader.TABLE: part.table}, table, metadata={PAIRING_KEY: pairing})


def compare(path: Path, model_dir: Path) -> dict[str, float]:
    """Run the file as the runtime does, and torch in float32 on the same embeddings."""
    model = load(model_dir, torch.float32)
    table = model.get_input_embeddings().weight.detach().numpy()
    random = np.random.default_rng(0)
    errors, divergences = [], []
    try:
        for found, wanted in (
            *_conversation(path, model, table, random),
            _batch(path, model, random),
        ):
            errors.append(float(np.abs(found - wanted).max() / np.abs(wanted).max()))
            divergences.append(_kl(wanted, found))
    except BackendError as error:
        raise ExportError(f"the ONNX file does not run as the model does: {error}") from error
    return {"max_error": max(errors), "random_kl": float(np.mean(np.concatenate(divergences)))}


def _conversation(path: Path, model: Any, table: Any, random: Any) -> Iterator[tuple[Any, Any]]:
    """Logits of the file and of torch while the past grows, is cut and grows again."""

    def ids(n: int) -> Any:
        return random.integers(0, len(table), n).astype(np.int32)

    def soft(n: int) -> Any:
        return random.normal(0, table.std(), (n, table.shape[1])).astype(np.float32)

    threads = torch.get_num_threads()
    with reader.open(path, n_ctx=_MIN_CONTEXT, threads=threads, exact=True) as backend:
        history = np.zeros((0, table.shape[1]), np.float32)
        # past 0 -> 15 -> 16 -> 20 -> 60, cut to 12 -> 15
        for kind, n, keep in (
            ("p", 15, 0),
            ("s", 1, 15),
            ("s", 4, 16),
            ("p", 40, 20),
            ("s", 3, 12),
        ):
            backend.rewind(keep)
            text = ids(n if kind == "s" else n // 2)
            image = soft(n - len(text))
            history = np.concatenate([history[:keep], table[text], image])
            with torch.no_grad():
                wanted = model(inputs_embeds=torch.from_numpy(history)[None]).logits[0].numpy()
            if kind == "s":
                yield backend.step(text), wanted[keep:]
            else:
                yield backend.prefill([text, image])[None], wanted[-1:]


def _batch(path: Path, model: Any, random: Any) -> tuple[Any, Any]:
    """Three sequences of six embeddings at once, which the backend itself never runs."""
    embeddings = random.standard_normal((3, 6, model.config.hidden_size)).astype(np.float32)
    with torch.no_grad():
        wanted = model(inputs_embeds=torch.from_numpy(embeddings)).logits.numpy()
    session = onnx_engine.session(path, threads=torch.get_num_threads(), device="cpu")
    feeds = {
        reader.EMBEDS: embeddings,
        reader.MASK: np.ones((3, 6), np.int64),
        reader.POSITIONS: np.tile(np.arange(6), (3, 1)),
    }
    for node in session.get_inputs():
        if node.name in feeds:
            continue
        dtype = np.float16 if "float16" in node.type else np.float32
        feeds[node.name] = np.zeros((3, node.shape[1], 0, node.shape[3]), dtype)
    found = session.run([reader.LOGITS], feeds)[0]
    if not np.isfinite(found).all():
        raise BackendError("a batch of three returned NaN or infinite logits")
    return found.reshape(18, -1), wanted.reshape(18, -1)


def _kl(wanted: Any, found: Any) -> Any:
    """KL(wanted || found) in nats per row of logits (T, V)."""
    log_p, log_q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (wanted, found))
    return (log_p.exp() * (log_p - log_q)).sum(-1).numpy()
