"""Signals to end: SIGTERM, SIGHUP (the terminal is gone), and SIGINT (Ctrl-C)."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
import contextlib
import signal
import threading


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception."""


class HungUp(KeyboardInterrupt):
    """SIGHUP, as an exception."""


_RAISED = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
    signal.SIGHUP: HungUp,
}


def number_of(exception: KeyboardInterrupt) -> signal.Signals:
    """The signal that was raised as this exception."""
    return next((n for n, kind in _RAISED.items() if type(exception) is kind), signal.SIGINT)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise what is theirs, as SIGINT KeyboardInterrupt."""

    def end(number, frame):
        raise _RAISED[number]

    with _handlers(dict.fromkeys((signal.SIGTERM, signal.SIGHUP), end)):
        yield


@contextlib.contextmanager
def held() -> Iterator[Callable[[Callable[[], object]], object]]:
    """Within the block a signal to end is raised by `wait(call)` alone, or at the block's end.

    What is written between two waits is written whole. `call` runs in a thread of its own, since
    Python answers a signal when the main thread is back from compiled code, and to compile, or to
    run a part of an epoch, is one call that can take minutes.

    Yields:
      `wait(call)`, which returns what `call()` does. After a signal the call may still be running:
      whoever ends the process then must not wait for its threads.
    """
    received, waiting = [], []

    def check():
        if received:
            raise _RAISED[received[0]]

    def note(number, frame):
        received.append(number)
        if waiting:
            check()

    def wait(call):
        future = Future()

        def run():
            try:
                future.set_result(call())
            except BaseException as e:
                future.set_exception(e)

        waiting.append(True)
        try:
            check()
            threading.Thread(target=run, daemon=True).start()
            return future.result()
        finally:
            waiting.clear()

    with _handlers(dict.fromkeys(_RAISED, note)):
        yield wait
    check()


@contextlib.contextmanager
def _handlers(handlers: dict) -> Iterator[None]:
    """Sets handlers by signal, and sets them back; only the main thread may, others do nothing.

    SIGHUP stays ignored where it is, as under `nohup`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        handlers = {n: handler for n, handler in handlers.items() if n != signal.SIGHUP}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
