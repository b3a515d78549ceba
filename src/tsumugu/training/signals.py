"""Being asked to stop: SIGTERM and SIGINT end the step, not the process."""

import contextlib
import os
import signal
from collections.abc import Iterator


class StopRequest:
    """The signal by which this process was asked to stop, if it was."""

    def __init__(self):
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While active, the first SIGTERM or SIGINT sets the request; a second SIGTERM ends the process at once.

    SIGTERM after SIGINT does not: Ctrl-C on a terminal reaches a process directly, and again through its launcher.
    """
    request = StopRequest()

    def handle(number: int, _frame) -> None:
        if number == request.signal == signal.SIGTERM:
            os._exit(128 + number)
        request.signal = request.signal or number

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
