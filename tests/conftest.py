"""Programs are compiled once for all tests and the commands that they start, and kept."""

import contextlib
from importlib import metadata
import os
import pathlib
import shutil
import zlib

import pytest

# Most of the tests' time is XLA's, which compiles the same operations in half of it when it does
# not make them fast. tests/test_arithmetic.py compiles as users do.
QUICK = '--xla_backend_optimization_level=0'
if metadata.version('jaxlib') < '0.11':  # Later ones have no such flag.
    QUICK += ' --xla_cpu_use_fusion_emitters=false'
# Bytes of programs that are kept from one run of the tests to the next.
KEPT = 2**31


def pytest_configure(config):
    """Sets what JAX reads when it is imported; pytest-xdist's processes take it over."""
    if 'PYTEST_XDIST_WORKER' not in os.environ:
        # A program is of the processor that it was compiled on.
        cpu = pathlib.Path('/proc/cpuinfo').read_bytes().partition(b'flags')[2].partition(b'\n')[0]
        folder = config.cache.mkdir(f'compiled-{zlib.crc32(cpu):08x}')
        with contextlib.suppress(FileNotFoundError):  # Other tests may be running here.
            if sum(path.stat().st_size for path in folder.iterdir()) > KEPT:
                shutil.rmtree(folder, ignore_errors=True)
        os.environ |= {
            'XLA_FLAGS': f'{QUICK} {os.environ.get("XLA_FLAGS", "")}',  # The caller's count.
            'JAX_COMPILATION_CACHE_DIR': str(folder),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
        }
    import commands

    commands.share_programs()


@pytest.fixture
def small_programs(monkeypatch):
    """For tests of whole runs, whose parts are tested elsewhere as they are."""
    import commands

    for name, value in commands.SMALL.items():
        monkeypatch.setattr(*name, value)
