"""Commands as a user starts them, each in a process of its own, but without its start's seconds.

A server imports the libraries once, with nothing of JAX started, and forks for every command.
"""

import dataclasses
import logging
import multiprocessing
from multiprocessing import resource_tracker
import os
import pathlib
import runpy
import signal
import sys
import tempfile
import threading
import traceback

import numpy as np

from ssn_jax.fused import forward
from ssn_jax.losses import sparse

ROOT = pathlib.Path(__file__).parents[1]
_LIBRARIES = [
    *('absl.app', 'cv2', 'jax', 'flax.linen', 'hypothesis', 'matplotlib.figure', 'optax'),
    *('orbax.checkpoint', 'skimage.measure', 'sklearn', 'tensorflow_datasets', 'tqdm'),
    *('array_record.python.array_record_data_source', 'safetensors.numpy', 'ssn_jax.main'),
    *('ssn_jax.pipeline', 'ssn_jax.predict_folder', 'ssn_jax.export', 'ssn_jax.report.page'),
]
# Smaller programs, which compute the same: one image at a time instead of four beside each other,
# and two programs of the sparse loss, for two numbers of noisy positions, instead of four.
SMALL = {(forward, '_IMAGES'): 1, (sparse, '_SURPLUS'): np.array([3.0, np.inf])}
_CACHE = 'JAX_COMPILATION_CACHE_DIR'
_server = multiprocessing.get_context('forkserver')
_server.set_forkserver_preload(_LIBRARIES)


def share_programs() -> None:
    """Makes JAX's cache of compiled programs one for several processes.

    By itself it writes a program so that another process can read half of it; or, with a limit of
    size, under a lock, after a look at every file that is there.
    """
    from jax._src import lru_cache

    def put(cache, key, value):
        file = pathlib.Path(cache.path, f'{key}-cache')
        draft = file.with_suffix(f'.{os.getpid()}-{threading.get_ident()}')
        draft.write_bytes(value)
        draft.replace(file)

    lru_cache.LRUCache.put = put


@dataclasses.dataclass
class Command:
    """A command that was started.

    Attributes:
      process: as multiprocessing has it.
      folder: where what it prints is kept, as long as this object is.
    """

    process: multiprocessing.Process
    folder: tempfile.TemporaryDirectory

    @property
    def out(self) -> str:
        """What it has printed to stdout so far."""
        return pathlib.Path(self.folder.name, 'out').read_text()

    @property
    def err(self) -> str:
        """What it has printed to stderr so far."""
        return pathlib.Path(self.folder.name, 'err').read_text()

    def end(self, timeout: float = 300) -> int:
        """Waits; the exit status, or minus the signal that ended it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f'no end after {timeout} s: {self.err[-2000:]}')
        return self.process.exitcode


def start(program: str, *arguments, cwd: pathlib.Path, **environment: str | None) -> Command:
    """Starts 'main', a command of `ssn-jax` by its name, or a program without its .py.

    Of the environment, None takes a variable away; XLA_FLAGS are added to those of the tests.
    """
    folder = tempfile.TemporaryDirectory(prefix='command-')
    for name in ('out', 'err'):
        pathlib.Path(folder.name, name).touch()
    environment = {'JAX_PLATFORMS': 'cpu', 'OMP_NUM_THREADS': '1'} | environment
    # The server has the environment of its own start.
    environment.setdefault(_CACHE, os.environ.get(_CACHE))
    if 'XLA_FLAGS' in environment:
        environment['XLA_FLAGS'] += f' {os.environ.get("XLA_FLAGS", "")}'
    words = [str(a) for a in arguments]
    process = _server.Process(target=_run, args=(program, words, cwd, folder.name, environment))
    process.start()
    return Command(process, folder)


def _run(program, arguments, cwd, folder, environment):
    """The command itself, in the forked process."""
    for number, name in ((1, 'out'), (2, 'err')):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(n, 'w', buffering=1, closefd=False) for n in (1, 2))
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    os.chdir(cwd)
    resource_tracker.register = lambda *_: None  # The locks of who is killed are no leak.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # Whoever starts the tests may ignore it.
    logging.root.handlers.clear()  # A library of the server's has set one up.
    import jax  # It has read the environment when the server imported it.

    from ssn_jax import terminal

    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_compilation_cache_dir', os.environ.get(_CACHE))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    terminal.quieten_cache()
    share_programs()
    for name, value in SMALL.items():
        setattr(*name, value)
    try:
        from ssn_jax import cli, main

        file = ROOT / 'scripts' / f'{program}.py'
        sys.argv = [str(file), *arguments]
        if program == 'main':
            main.cli()
        elif program in cli.COMMANDS:
            cli.main(program)
        else:
            runpy.run_path(str(file), run_name='__main__')
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
