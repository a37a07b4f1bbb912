"""Signals to end: SIGTERM, and SIGINT (Ctrl-C).

Python answers a signal when the main thread is back from compiled code. To compile, and to run an
epoch, is one call each, which can take minutes; `answered` does not wait for it.
"""

from collections.abc import Callable, Iterator
import contextlib
import signal
import socket
import threading

ENDING = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception."""


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Within the block SIGTERM raises `Terminated`, as SIGINT raises KeyboardInterrupt."""

    def terminate(number, frame):
        raise Terminated

    with _handler({signal.SIGTERM: terminate}):
        yield


@contextlib.contextmanager
def answered(answer: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Within the block a signal to end calls `answer` at once, in a thread of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, told = socket.socketpair()
    told.setblocking(False)

    def listen():
        while number := heard.recv(1):
            if number[0] in ENDING:
                answer(signal.Signals(number[0]))
        heard.close()

    threading.Thread(target=listen, daemon=True).start()
    # The system's own handler writes the number to the socket, whatever the main thread does; the
    # one in Python then has nothing left to do.
    with _handler(dict.fromkeys(ENDING, lambda number, frame: None)):
        before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            told.close()


@contextlib.contextmanager
def _handler(handlers: dict) -> Iterator[None]:
    """Sets handlers by signal, and sets them back; only the main thread may, others do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
