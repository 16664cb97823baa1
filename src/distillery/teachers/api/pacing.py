"""When the next call to an endpoint may start."""

from __future__ import annotations

import random
import threading
import time

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0  # seconds; the random pause after the n-th failure is at most first * 2**n


class Pacer:
    """Spaces the calls of all threads: a rate limit, pauses after failures, and an event that ends every wait."""

    def __init__(self, requests_per_minute: float | None):
        self.interval = 60 / requests_per_minute if requests_per_minute else 0.0  # seconds between calls
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._next_call = self._resume = 0.0  # on the monotonic clock

    def wait_for_turn(self) -> bool:
        """Wait until the rate limit, and any pause that the server requested, permit a call; False if stopped."""
        with self._lock:
            turn = max(time.monotonic(), self._next_call)
            if self.interval:
                self._next_call = turn + self.interval
        while (wait := max(turn, self._resume) - time.monotonic()) > 0 and not self.stop.is_set():
            self.stop.wait(wait)
        return not self.stop.is_set()

    def pause(self, failures: int, retry_after: float | None) -> None:
        """Wait after a failed call: a random time that grows with `failures`.

        retry_after: seconds that the server requested; they hold back the calls of all threads instead.
        """
        if retry_after is not None:
            with self._lock:
                self._resume = max(self._resume, time.monotonic() + retry_after)
        else:
            self.stop.wait(random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2**failures)))
