"""Programs are compiled once for all tests and for the commands that they start."""

import os
import shutil
import tempfile


def pytest_configure(config):
    """Sets what JAX reads when it is imported; pytest-xdist's processes take it over."""
    if 'PYTEST_XDIST_WORKER' not in os.environ:
        folder = tempfile.mkdtemp(prefix='compiled-')
        config.add_cleanup(lambda: shutil.rmtree(folder))
        os.environ |= {
            'JAX_COMPILATION_CACHE_DIR': folder,
            'JAX_COMPILATION_CACHE_MAX_SIZE': str(2**33),  # With a limit, files are locked.
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
        }
