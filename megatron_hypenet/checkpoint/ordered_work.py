"""Divide numbered work among threads, and finish it in order, with a fixed number of buffers."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from megatron_hypenet.checkpoint.output_file import aligned_buffer


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
    afterwards: Callable[[int, memoryview], None] | None = None,
) -> None:
    """Call `work(i, buffer)` for every i below `count` from several threads, and `finish(i,
    content)` one at a time in the order of i, where `content` is the part of the buffer that `work`
    said it used; then `afterwards(i, content)`, in any order again.

    `afterwards` is for what waits for a device, so it gets a thread more. Numbers are given out in
    order, so of several failures the first is raised. After a failure no more are given out, and
    nothing behind it is finished. Buffers are aligned to pages.
    """
    _Line(count, work, finish, afterwards, workers, buffer_bytes).run()


_Filled = tuple[int, memoryview, int]
"""Number, buffer, and the number of bytes of it that are used."""


class _Line:
    """The state of `run_in_order`."""

    def __init__(
        self,
        count: int,
        work: Callable[[int, memoryview], int],
        finish: Callable[[int, memoryview], None],
        afterwards: Callable[[int, memoryview], None] | None,
        workers: int,
        buffer_bytes: int,
    ) -> None:
        self.count = count
        self.work = work
        self.finish = finish
        self.afterwards = afterwards
        self.threads = max(1, min(workers, count)) + (afterwards is not None)
        self.free = [aligned_buffer(buffer_bytes) for _ in range(2 * self.threads + 2)]
        self.changed = threading.Condition()
        self.given = 0
        self.finished = 0
        self.ready: dict[int, _Filled] = {}
        self.finishing = False
        self.done: deque[_Filled] = deque()
        """What `afterwards` still gets."""
        self.failures: dict[int, BaseException] = {}
        self.stopped = False

    def run(self) -> None:
        with ThreadPoolExecutor(self.threads, "convert") as pool:
            threads = [pool.submit(self.worker) for _ in range(self.threads)]
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
        step: Callable[[], None] | None
        while (step := self.next_step()) is not None:
            step()

    def next_step(self) -> Callable[[], None] | None:
        """Wait for something to do: finishing first, since all else waits for it in the end."""
        with self.changed:
            while not (self.stopped or self.failures):
                if self.finished in self.ready and not self.finishing:
                    self.finishing = True
                    return self.finish_ready
                if self.done:
                    filled = self.done.popleft()
                    return lambda: self.do_afterwards(filled)
                # the buffer comes first: the lowest number given out can always be worked on
                if self.free and self.given < self.count:
                    self.given += 1
                    index, buffer = self.given - 1, self.free.pop()
                    return lambda: self.do_work(index, buffer)
                if self.finished == self.count:
                    break
                self.changed.wait()
            return None

    def do_work(self, index: int, buffer: memoryview) -> None:
        try:
            used = self.work(index, buffer)
        except BaseException as error:
            self.fail(index, error)
            return
        with self.changed:
            self.ready[index] = (index, buffer, used)
            self.changed.notify_all()

    def finish_ready(self) -> None:
        while True:
            with self.changed:
                if self.finished not in self.ready or self.failures:
                    self.finishing = False
                    return
                filled = self.ready.pop(self.finished)
            index, buffer, used = filled
            try:
                self.finish(index, buffer[:used])
            except BaseException as error:
                self.fail(index, error)
            with self.changed:
                self.finished += 1
                if self.afterwards is None:
                    self.free.append(buffer)
                else:
                    self.done.append(filled)
                self.changed.notify_all()

    def do_afterwards(self, filled: _Filled) -> None:
        index, buffer, used = filled
        assert self.afterwards is not None
        try:
            self.afterwards(index, buffer[:used])
        except BaseException as error:
            self.fail(index, error)
        with self.changed:
            self.free.append(buffer)
            self.changed.notify_all()

    def fail(self, index: int, error: BaseException) -> None:
        with self.changed:
            self.failures[index] = error
            self.changed.notify_all()
