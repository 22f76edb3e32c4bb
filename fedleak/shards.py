"""Files that only grow, one blob after the other, and a thread that writes them while the federation goes on."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fedleak.errors import FedleakError

WAITING = 64 * 2**20
"""Bytes that may wait to be written before whoever brings more has to wait too."""

_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND

IDLE = 0.1
"""Seconds until a thread with nothing to write ends; the next job starts another."""


def append(path: Path, data: bytes) -> int:
    """Put `data` at the end of a file, whole or not at all, whoever else appends; returns where it begins.

    Raises:
        FedleakError: the disk is full, or the folder cannot be written to.
    """
    try:
        try:
            file = os.open(path, _APPEND, 0o644)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, _APPEND, 0o644)
        try:
            _lock(file)
            begin = os.lseek(file, 0, os.SEEK_END)
            try:
                left = memoryview(data)
                while left:
                    left = left[os.write(file, left) :]
            except OSError:
                with suppress(OSError):
                    os.ftruncate(file, begin)
                raise
        finally:
            os.close(file)
    except OSError as error:
        raise FedleakError(f"{path}: cannot be written ({error.strerror}); make room there, or keep less") from error
    return begin


def _lock(file: int) -> None:
    """Until the file is closed, no other process appends to it; where files cannot be locked, one process writes."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(file, fcntl.LOCK_EX)


class Background:
    """Does jobs in order on a thread of its own; what one raised is raised where the next is brought.

    Args:
        most: bytes that may wait.
    """

    def __init__(self, most: int = WAITING) -> None:
        self.most = most
        self._jobs: deque[tuple[int, Callable[[], object]]] = deque()
        self._bytes = 0
        self._busy = False
        self._error: BaseException | None = None
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None

    def put(self, job: Callable[[], object], size: int = 0) -> None:
        """Have a job done that holds `size` bytes; waits while too many wait already."""
        with self._change:
            self._wait_for_room(size)
            self._raise()
            self._append(job, size)
            self._change.notify_all()

    def put_aside(self, job: Callable[[], object], size: int = 0) -> None:
        """As `put`, for whom nobody waits: done within `IDLE` seconds, and errors are left for whoever brings more."""
        with self._change:
            self._wait_for_room(size)
            if self._error is None:
                self._append(job, size)

    def _wait_for_room(self, size: int) -> None:
        if self._bytes and self._bytes + size > self.most:
            self._change.notify_all()
            self._change.wait_for(lambda: self._error is not None or not self._bytes or self._bytes + size <= self.most)

    def _append(self, job: Callable[[], object], size: int) -> None:
        self._jobs.append((size, job))
        self._bytes += size
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="fedleak-writer")
            self._thread.start()

    def flush(self) -> None:
        """Wait until everything is done; raises what a job raised."""
        with self._change:
            self._change.wait_for(lambda: self._error is not None or (not self._jobs and not self._busy))
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self) -> None:
        while True:
            with self._change:
                if not self._change.wait_for(lambda: len(self._jobs) > 0, timeout=IDLE):
                    self._thread = None  # the process may end
                    return
                size, job = self._jobs.popleft()
                self._busy = True
            try:
                job()
            except BaseException as error:
                with self._change:
                    self._error = error
                    self._jobs.clear()
                    self._bytes = size
            with self._change:
                self._bytes -= size
                self._busy = False
                self._change.notify_all()
