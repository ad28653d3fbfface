"""NVML is read through its C interface; the library here is compiled for the test."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rx_edge.nvidia import Driver, Gpu, driver

SOURCE = r"""
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
static int handles[2];
int nvmlInit_v2(void) { return INIT; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned n) { strncpy(text, "580.95.05", n); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13020; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **device) { *device = &handles[i]; return 0; }
int nvmlDeviceGetName(void *device, char *text, unsigned n) {
  strncpy(text, device == handles ? "RTX 6000 Ada" : "L4", n); return 0; }
int nvmlDeviceGetMemoryInfo(void *device, memory_t *m) {
  m->total = 48ULL << 30; m->free = (device == handles ? 40ULL : 4ULL) << 30; return MEMORY; }
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
  *major = 8; *minor = 9; return 0; }
"""


def _library(folder: Path, *, init: int = 0, memory: int = 0) -> str:
    source, library = folder / "nvml.c", folder / "libnvml.so"
    source.write_text(SOURCE)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", f"-DINIT={init}", f"-DMEMORY={memory}", "-o", str(library),
         str(source)],
        check=True,
    )  # fmt: skip
    return str(library)


def test_what_the_driver_says(tmp_path: Path) -> None:
    assert driver(_library(tmp_path)) == Driver(
        version="580.95.05",
        cuda=(13, 2),
        gpus=(
            Gpu("RTX 6000 Ada", (8, 9), 48 << 30, 40 << 30),
            Gpu("L4", (8, 9), 48 << 30, 4 << 30),
        ),
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [({"init": 9}, "NVML error 9"), ({"memory": 15}, "nvmlDeviceGetMemoryInfo")],
)
def test_a_driver_that_fails_is_a_sentence(
    tmp_path: Path, fault: dict[str, int], message: str
) -> None:
    found = driver(_library(tmp_path, **fault))
    assert isinstance(found, str)
    assert message in found


def test_no_driver_is_a_sentence() -> None:
    assert driver("libno-such-nvml.so.1") == (
        "no NVIDIA driver: libno-such-nvml.so.1 is not on this machine"
    )
