"""A command prefix that takes the network away, for tests that prove it is not needed."""

from __future__ import annotations

import functools
import shutil
import subprocess

import pytest

_PREFIXES = (["unshare", "-rn"], ["unshare", "-n"])  # as any user; as root


@functools.cache
def _working() -> tuple[str, ...]:
    for prefix in _PREFIXES:
        if shutil.which(prefix[0]) is None:
            break
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return tuple(prefix)
    return ()


def no_network() -> tuple[str, ...]:
    """Put it before a command; skips the test where the kernel does not allow it."""
    if not _working():
        pytest.skip("a network namespace is not allowed here (unshare -rn, unshare -n)")
    return _working()
