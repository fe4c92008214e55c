"""Divide numbered work among threads, and finish it in order, with a fixed number of buffers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


@contextlib.contextmanager
def one_thread_per_operation() -> Iterator[None]:
    """Let torch's operations use one thread each, for code that is divided among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_in_order(
    count: int,
    work: Callable[[int, memoryview], int],
    finish: Callable[[int, memoryview], None],
    *,
    workers: int,
    buffer_bytes: int,
) -> None:
    """Call `work(i, buffer)` for every i below `count` from several threads, and `finish(i,
    content)` one at a time in the order of i, where `content` is the part of the buffer that `work`
    said it used.

    Numbers are given out in order, so of several failures the first is raised. After a failure no
    more are given out, and nothing behind it is finished.
    """
    _Line(count, work, finish, workers, buffer_bytes).run()


class _Line:
    """The state of `run_in_order`."""

    def __init__(
        self,
        count: int,
        work: Callable[[int, memoryview], int],
        finish: Callable[[int, memoryview], None],
        workers: int,
        buffer_bytes: int,
    ) -> None:
        self.count = count
        self.work = work
        self.finish = finish
        self.workers = max(1, min(workers, count))
        self.free = [memoryview(bytearray(buffer_bytes)) for _ in range(2 * self.workers + 2)]
        self.changed = threading.Condition()
        self.given = 0
        self.finished = 0
        self.ready: dict[int, tuple[memoryview, int]] = {}
        self.finishing = False
        self.failures: dict[int, BaseException] = {}
        self.stopped = False

    def run(self) -> None:
        with ThreadPoolExecutor(self.workers, "convert") as pool:
            threads = [pool.submit(self.worker) for _ in range(self.workers)]
            try:
                for thread in threads:
                    thread.result()
            except BaseException:  # an interrupt: the threads end after their piece
                self.stop()
                raise
        if self.failures:
            raise self.failures[min(self.failures)]

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def worker(self) -> None:
        while (taken := self.take()) is not None:
            index, buffer = taken
            try:
                used = self.work(index, buffer)
            except BaseException as error:
                self.fail(index, error)
                return
            with self.changed:
                self.ready[index] = (buffer, used)
                if self.finishing:
                    continue  # the thread that finishes comes to it
                self.finishing = True
            self.finish_ready()

    def take(self) -> tuple[int, memoryview] | None:
        # the buffer comes first: the lowest number that was given out can always be worked on
        with self.changed:
            self.changed.wait_for(
                lambda: self.stopped or self.failures or self.free or self.given == self.count
            )
            if self.stopped or self.failures or self.given == self.count:
                return None
            self.given += 1
            return self.given - 1, self.free.pop()

    def finish_ready(self) -> None:
        while True:
            with self.changed:
                index = self.finished
                if index not in self.ready or self.failures:
                    self.finishing = False
                    self.changed.notify_all()
                    return
                buffer, used = self.ready.pop(index)
            try:
                self.finish(index, buffer[:used])
            except BaseException as error:
                self.fail(index, error)
            with self.changed:
                self.finished += 1
                self.free.append(buffer)
                self.changed.notify_all()

    def fail(self, index: int, error: BaseException) -> None:
        with self.changed:
            self.failures[index] = error
            self.changed.notify_all()
