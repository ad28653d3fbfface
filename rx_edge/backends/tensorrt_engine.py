"""ONNX -> TensorRT engine, by one adapter over the packages `tensorrt` (11) and `tensorrt_rtx`.

They share their API, and both build strongly typed networks only: precision is what the ONNX file
says. Parsing, checking and building need no GPU with TensorRT-RTX, so that an exporting machine can
prove that a file will be taken.

Does not cover: keeping engines (`engine_cache.py`) and running them (`vision_tensorrt.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from rx_edge.backends.vision_onnx import INPUT, OUTPUT
from rx_edge.errors import BackendError, MissingExtraError
from rx_edge.optional import require

Progress: TypeAlias = Callable[[str, int, int], None]  # phase, steps done, steps in all

# modules of each flavour, the standalone wheel's name first
FLAVOURS = {
    "tensorrt_rtx": ("tensorrt_rtx_bindings", "tensorrt_rtx"),
    "tensorrt": ("tensorrt",),
}
LABELS = {"tensorrt_rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
MINIMUM_MAJOR = {"tensorrt_rtx": 1, "tensorrt": 11}
FLAGS = "strongly-typed"  # part of the cache key: change it when build options change
_KEPT_MESSAGES = 20


class Library:
    """One imported flavour and its logger, which the engine library keeps a pointer to."""

    def __init__(self, trt: Any, flavour: str) -> None:
        self.trt = trt
        self.flavour = flavour
        self.version = str(trt.__version__)
        self.label = f"{LABELS[flavour]} {self.version}"
        self.logger, self.messages = _logger(trt)

    def reasons(self) -> str:
        """The library's latest errors, in one line."""
        return "; ".join(dict.fromkeys(self.messages)) or "it gives no reason"

    def targets(self) -> list[str]:
        """Compute capabilities to choose from, such as "SM89"; [] where there is no choice."""
        if self.flavour != "tensorrt_rtx":
            return []
        names = [name for name in self.trt.ComputeCapability.__members__ if name.startswith("SM")]
        return sorted(names, key=lambda name: int(name[2:]))


@dataclass(frozen=True)
class Signature:
    """pixel_values float32 (batch, 3, size, size) -> soft_prompt float32 (batch, tokens, width)."""

    size: int
    tokens: int
    width: int


@dataclass(frozen=True)
class Built:
    """A serialised engine and what it computes."""

    plan: bytes
    signature: Signature
    profile: tuple[tuple[int, ...], ...]  # shapes of pixel_values: smallest, tuned for, largest


def find(gpu_name: str | None = None) -> Library:
    """The flavour to use: TensorRT-RTX first on RTX cards and without a GPU, else TensorRT first.

    Raises:
        MissingExtraError: neither package is installed.
        BackendError: only one that is too old.
    """
    consumer = gpu_name is None or "RTX" in gpu_name or "GeForce" in gpu_name
    order = ("tensorrt_rtx", "tensorrt") if consumer else ("tensorrt", "tensorrt_rtx")
    refused = None
    for flavour in order:
        for module in FLAVOURS[flavour]:
            try:
                return _library(module, flavour)
            except MissingExtraError:
                continue
            except BackendError as error:
                refused = error
    if refused is not None:
        raise refused
    raise MissingExtraError(
        "this needs 'tensorrt' or 'tensorrt_rtx', neither of which is installed: "
        'pip install "rx-edge[tensorrt]"'
    )


@lru_cache
def _library(module: str, flavour: str) -> Library:
    trt: Any = require(module, extra="tensorrt")
    if not hasattr(trt, "Builder"):  # a namespace without the bindings
        raise MissingExtraError(f'{module!r} is incomplete: pip install "rx-edge[tensorrt]"')
    if int(str(trt.__version__).partition(".")[0]) < MINIMUM_MAJOR[flavour]:
        raise BackendError(
            f"{module} {trt.__version__} is installed; {MINIMUM_MAJOR[flavour]} or newer is "
            f"needed: pip install --upgrade {module}"
        )
    return Library(trt, flavour)


def _logger(trt: Any) -> tuple[Any, list[str]]:
    messages: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps errors for the exception instead of printing them."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.ERROR:
                messages.append(str(text).strip())
                del messages[:-_KEPT_MESSAGES]

    return Logger(), messages


def build(
    library: Library,
    path: Path,
    *,
    max_batch: int,
    compute_capability: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Built:
    """Parse and check the ONNX file, and build its engine.

    Args:
        max_batch: the profile is 1 to this many images, tuned for 1.
        compute_capability: such as (8, 9); None = the library's default.
        progress: called from the builder's threads; what it raises ends the build and is raised.

    Raises:
        BackendError: the parser or the builder refuses; the message names the nodes.
    """
    if max_batch < 1:
        raise BackendError(f"max_batch is {max_batch}; at least 1 image is needed")
    if not path.is_file():
        raise BackendError(f"vision model {str(path)!r} does not exist; export it again")
    trt = library.trt
    library.messages.clear()
    builder = trt.Builder(library.logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, library.logger)
    if not parser.parse_from_file(str(path)):
        raise BackendError(
            f"{library.label} cannot read {str(path)!r}: {_parser_errors(parser)}; "
            "use the ONNX backend, or export again"
        )
    signature = network_signature(trt, network, path)
    config = builder.create_builder_config()
    if compute_capability is not None:
        _target(library, config, compute_capability)
    shape = (3, signature.size, signature.size)
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, (1, *shape), (1, *shape), (max_batch, *shape))
    config.add_optimization_profile(profile)
    monitor = _monitor(trt, progress) if progress is not None else None
    if monitor is not None:
        config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor is not None and monitor.error is not None:
        raise monitor.error
    if plan is None:
        raise BackendError(f"{library.label} cannot build {str(path)!r}: {library.reasons()}")
    shapes = tuple(tuple(dims) for dims in profile.get_shape(INPUT))
    return Built(bytes(plan), signature, shapes)


def _parser_errors(parser: Any) -> str:
    found = []
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        where = f"node {error.node_name()!r} ({error.node_operator()}): "
        found.append(f"{where if error.node() >= 0 else ''}{error.desc()}")
    return "; ".join(dict.fromkeys(found)) or "no reason given"


def _target(library: Library, config: Any, compute_capability: tuple[int, int]) -> None:
    name, targets = "SM{}{}".format(*compute_capability), library.targets()
    if not targets:
        raise BackendError(
            f"{library.label} builds for the GPU of this machine only, not for {name}; "
            "install TensorRT-RTX"
        )
    if name not in targets:
        raise BackendError(
            f"{library.label} does not build for {name} (it does for {', '.join(targets)}); "
            "use TensorRT, or the ONNX backend with CUDA"
        )
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(getattr(library.trt.ComputeCapability, name), 0):
        raise BackendError(f"{library.label} refused the compute capability {name}")


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None
            self._steps: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._steps[name] = steps
            self._tell(name, 0)

        def step_complete(self, name: str, step: int) -> bool:
            self._tell(name, step + 1)
            return self.error is None  # False ends the build

        def phase_finish(self, name: str) -> None:
            self._tell(name, self._steps.get(name, 0))

        def _tell(self, name: str, done: int) -> None:
            if self.error is not None:
                return
            try:
                progress(name, done, self._steps.get(name, done))
            except BaseException as error:  # must not travel through the C++ builder
                self.error = error

    return Monitor()


def network_signature(trt: Any, network: Any, path: Path) -> Signature:
    """The signature of a parsed network.

    Raises:
        BackendError: names, types or shapes are not those of a vision file.
    """
    tensors = [
        [(t.name, t.dtype, tuple(t.shape)) for t in (get(i) for i in range(count))]
        for get, count in (
            (network.get_input, network.num_inputs),
            (network.get_output, network.num_outputs),
        )
    ]
    return _signature(trt, tensors[0], tensors[1], path)


def engine_signature(trt: Any, engine: Any, path: Path, *, max_batch: int) -> Signature:
    """The signature of a loaded engine, whose profile must be 1 to `max_batch` images.

    Raises:
        BackendError: it is not the engine of a vision file, or its profile is another one.
    """
    found: dict[bool, list[tuple[str, Any, tuple[int, ...]]]] = {True: [], False: []}
    for number in range(engine.num_io_tensors):
        name = engine.get_tensor_name(number)
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        entry = (name, engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name)))
        found[is_input].append(entry)
    signature = _signature(trt, found[True], found[False], path)
    shape = (3, signature.size, signature.size)
    wanted = [(1, *shape), (1, *shape), (max_batch, *shape)]
    profile = [tuple(dims) for dims in engine.get_tensor_profile_shape(INPUT, 0)]
    if profile != wanted:
        raise BackendError(f"the engine of {str(path)!r} has the profile {profile}, not {wanted}")
    return signature


def _signature(
    trt: Any, inputs: list[tuple[str, Any, Any]], outputs: list[tuple[str, Any, Any]], path: Path
) -> Signature:
    if [i[0] for i in inputs] == [INPUT] and [o[0] for o in outputs] == [OUTPUT]:
        (_, type_in, shape_in), (_, type_out, shape_out) = inputs[0], outputs[0]
        if (
            type_in == type_out == trt.DataType.FLOAT
            and len(shape_in) == 4
            and len(shape_out) == 3
            and shape_in[:2] == (-1, 3)  # -1: any batch
            and shape_in[2] == shape_in[3] > 0
            and shape_out[0] == -1
            and min(shape_out[1:]) > 0
        ):
            return Signature(shape_in[2], shape_out[1], shape_out[2])
    raise BackendError(
        f"{str(path)!r} maps {inputs} to {outputs}; expected float32 {INPUT} (-1, 3, S, S) to "
        f"float32 {OUTPUT} (-1, N, D): export it again"
    )
