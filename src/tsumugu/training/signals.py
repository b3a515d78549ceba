"""Being asked to stop: SIGTERM and SIGINT end the step, not the process."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

_ECHO_SECONDS = 5.0


class StopRequest:
    """The signal by which this process was asked to stop, if it was."""

    def __init__(self):
        self.signal: int | None = None
        self.time = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While active, the first SIGTERM or SIGINT sets the request; one that comes later ends the process at once.

    One within five seconds does not: Ctrl-C on a terminal, Slurm and others signal every process of a job, so that the
    same request arrives directly and again through torchrun.
    """
    request = StopRequest()

    def handle(number: int, _frame) -> None:
        if request.signal is None:
            request.signal, request.time = number, time.monotonic()
        elif time.monotonic() - request.time > _ECHO_SECONDS:
            os._exit(128 + number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
