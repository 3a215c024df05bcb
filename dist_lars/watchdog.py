"""A rank that makes no progress says where it stands and ends, so that the launcher ends the job."""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

START_LIMIT = 300.0  # seconds until steps have been measured: loaders start, GPUs warm up
STEPS = 30  # then: so many of the longest step
BACKSTOP = 30.0  # seconds after which faulthandler's own thread, which needs no interpreter lock, does the same


class Watchdog:
    """Expects `beat(what)` again and again; after `limit()` seconds without one, dumps all stacks and exits with 1.

    The limit is `seconds` if given, else the larger of 300 s and 30 times the longest time between two beats so far.
    """

    def __init__(self, rank: int, stacks: Path, seconds: float | None, tell: Callable[[str], None]) -> None:
        self.rank, self.stacks, self.seconds, self.tell = rank, stacks, seconds, tell
        self.doing, self.since, self.longest = "starting", time.monotonic(), 0.0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self.since = time.monotonic()
        self.thread.start()

    def beat(self, what: str) -> None:
        """Progress: from now on this rank does `what`."""
        now = time.monotonic()
        self.longest = max(self.longest, now - self.since)
        self.doing, self.since = what, now

    def limit(self) -> float:
        """Seconds of silence after which this rank counts as hanging."""
        return self.seconds if self.seconds is not None else max(START_LIMIT, STEPS * self.longest)

    def stop(self) -> None:
        """Watch no more."""
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while True:
            left = self.since + self.limit() - time.monotonic()
            if left <= 0:
                self._end()
            faulthandler.dump_traceback_later(left + BACKSTOP, exit=True)
            if self.ended.wait(min(left, 1.0 + left / 2)):
                faulthandler.cancel_dump_traceback_later()
                return

    def _end(self) -> None:
        where = f"rank {self.rank} on {socket.gethostname()}"
        text = f"{where} made no progress for {self.limit():.0f} s while {self.doing}"
        try:
            print(f"error: {text}; stacks of all its threads: {self.stacks}", file=sys.stderr, flush=True)
            self._dump(text)
            self.tell(text)
        finally:
            os._exit(1)

    def _dump(self, text: str) -> None:
        try:
            with self.stacks.open("w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError as e:  # a full disk, or a directory that is gone
            print(f"error: {self.stacks} could not be written ({e.strerror}):", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
