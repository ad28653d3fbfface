"""Joules per token and per report: the GPU's own power sensor while reports are written.

The sensor (NVML, whole board) is read twenty times a second for at least a minute, because it
averages over tens of milliseconds and lags; the mean power times the seconds are the joules. What
the card draws while idle, beforehand, is told and not taken off.

Does not cover: the processor, memory and power supply of the host.
"""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from rx_edge.closing import Closing
from rx_edge.errors import BackendError
from rx_edge.nvidia import LIBRARY, driver
from rx_edge_bench.gpu.artefacts import gguf
from rx_edge_bench.gpu.language import TOKENS, Replayed, opened, segments, write
from rx_edge_bench.gpu.plan import Job

SECONDS, SMALL_SECONDS = 60.0, 2.0
IDLE = 3.0  # seconds
EVERY = 0.05  # seconds
LEAST = 10  # readings


def energy(job: Job, precision: str) -> dict[str, Any]:
    """Joules per token and report; only with a GPU.

    Raises:
        BackendError: the sensor does not answer, or the file does not run on the GPU.
    """
    if not job.gpu:
        return {"not measured": str(driver()), "line": "not measured: no GPU"}
    with Sensor() as sensor:
        time.sleep(IDLE)
    idle = sensor.watts()
    with opened(job, gguf(job, precision)) as language:
        prompt = segments(language)

        def report() -> None:
            write(language, prompt, Replayed((), language.n_vocab))

        report()  # warms up
        found = metered(report, SMALL_SECONDS if job.small else SECONDS)
    told = f"{found['joules_per_token']:.3f} J per token, {found['watts']:.0f} W (idle {idle:.0f})"
    return {"source": "NVML board power", "idle_watts": idle, **found, "line": told}


def metered(report: Callable[[], object], length: float, library: str = LIBRARY) -> dict[str, Any]:
    """Energy of writing reports for at least `length` seconds.

    Args:
        library: NVML.

    Raises:
        BackendError: the sensor does not answer.
    """
    reports, started = 0, time.perf_counter()
    with Sensor(library) as sensor:
        while time.perf_counter() - started < length:
            report()
            reports += 1
        seconds = time.perf_counter() - started
    watts = sensor.watts()
    return {
        "seconds": seconds,
        "reports": reports,
        "readings": len(sensor.readings),
        "watts": watts,
        "joules_per_report": watts * seconds / reports,
        "joules_per_token": watts * seconds / reports / TOKENS,
    }


class Sensor(Closing):
    """Reads the first GPU's power in a thread while the body runs.

    Attributes:
        readings: watts.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        """Find the device.

        Raises:
            BackendError: no driver, or it has no such sensor.
        """
        try:
            self._nvml: Any = ctypes.CDLL(library)
        except OSError as error:
            raise BackendError(f"no NVIDIA driver: {library} is not on this machine") from error
        self._device = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(0), ctypes.byref(self._device))
        self.readings: list[float] = []
        self._read()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)

    def watts(self) -> float:
        """Mean of the readings.

        Raises:
            BackendError: too few.
        """
        if len(self.readings) < LEAST:
            raise BackendError(f"{len(self.readings)} readings of power; at least {LEAST}")
        return statistics.fmean(self.readings)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def close(self) -> None:
        """End the readings."""
        self._ended.set()
        self._thread.join()
        self._nvml.nvmlShutdown()

    def _go_on(self) -> None:
        while not self._ended.wait(EVERY):
            self._read()

    def _read(self) -> None:
        milliwatts = ctypes.c_uint()
        self._call("nvmlDeviceGetPowerUsage", self._device, ctypes.byref(milliwatts))
        self.readings.append(milliwatts.value / 1000)

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._nvml, function)(*arguments)
        if code:
            raise BackendError(f"{function} failed (NVML error {code}); see nvidia-smi")
