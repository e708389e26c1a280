"""A child process that runs tasks, so that a crash or a hang is a result and not the end."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from attnspec.conformance.case import Case, SavedCase
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.report import Failure, Result
from attnspec.conformance.violation import Violation

if TYPE_CHECKING:
    from attnspec.conformance.runner import Profile, Task

START_UP = 120.0
"""Seconds a fresh process may take before its first law."""

DEVICES = "CUDA_VISIBLE_DEVICES"
POLL = 1.0
"""Seconds between looks at whether the process is still alive, and still wanted."""


class Child:
    """One worker process, restarted after a crash or a time-out.

    Kernels travel by name and position, not by value: the child loads them the way the parent
    did when they came from an entry point, and by pickling otherwise. With a `gpu` it sees that one
    alone.
    """

    def __init__(
        self, kernels: Sequence[Kernel], profile: Profile, saved: Sequence[SavedCase]
    ) -> None:
        self.kernels = list(kernels)
        self.profile = profile
        self.saved = list(saved)
        self.gpu: str | None = None
        self.context = multiprocessing.get_context("spawn")
        self.process: Any = None
        self.cancelled = False

    def run(self, task: Task, timeout: float) -> Result:
        """The task's result; "crash" with the case it was on if the child did not come back."""
        doing, limit = "finish", timeout
        if self.process is None:
            self._start()
            doing, limit = "start", START_UP
        deadline = time.monotonic() + limit
        number = self.kernels.index(task.kernel)
        self.inbox.put((number, task.law.name, task.dtype))
        current: str | None = None
        while True:
            try:
                left = max(0.0, deadline - time.monotonic())
                kind, payload = self.outbox.get(timeout=min(left, POLL))
            except queue.Empty:
                reason = f"did not {doing} within {limit:g} s"
                if not self.process.is_alive():
                    reason = f"killed its process (exit code {self.process.exitcode})"
                elif self.cancelled:
                    reason = "was cancelled"
                elif left > POLL:
                    continue
                self._stop()
                return self._crash(task, reason, current)
            if kind == "ready":
                doing, limit = "finish", timeout
                deadline = time.monotonic() + limit
            elif kind == "case":
                current = payload
            elif kind == "error":
                self._stop()
                return self._crash(task, payload, current)
            else:
                if kind == "last":
                    self._stop()
                return payload

    def _start(self) -> None:
        self.inbox, self.outbox = self.context.Queue(), self.context.Queue()
        arguments = (self.gpu, self.kernels, self.profile, self.saved, self.inbox, self.outbox)
        process = self.context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        self.process = process

    def _stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.process = None

    def close(self) -> None:
        """Stop the worker."""
        if self.process is not None:
            self.inbox.put(None)
            self.process.join(timeout=10)
            if self.process.is_alive():
                self.process.kill()
            self.process = None

    def _crash(self, task: Task, reason: str, current: str | None) -> Result:
        import json

        failure = None
        if current is not None:
            failure = Failure(
                task.kernel.name,
                task.kernel.operation,
                task.law.name,
                task.law.promise,
                Case.from_dict(json.loads(current)),
                Violation(task.kernel.operation, reason),
                "wrong on this case (a crash is not minimised)",
            )
        return Result(
            task.kernel.name, task.kernel.operation, task.law.name, task.dtype,
            "crash", 1, 0.0, {}, failure, note=reason,
        )  # fmt: skip


def run_side_by_side(
    groups: Sequence[Sequence[tuple[int, Task]]],
    make_child: Callable[[], Child],
    jobs: int,
    timeout: float,
) -> Generator[tuple[int, Result], None, None]:
    """Numbers and results of all tasks as they come, from so many processes at a time.

    A group of tasks runs in one process, and processes share the GPUs evenly. Closing the iterator
    cancels what has not finished.
    """
    waiting: queue.SimpleQueue[Sequence[tuple[int, Task]]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Result] | Exception] = queue.SimpleQueue()
    for group in groups:
        waiting.put(group)
    children = [make_child() for _ in range(min(jobs, len(groups)))]
    for child, gpu in zip(children, itertools.cycle(gpus() or [None]), strict=False):
        child.gpu = gpu

    def work(child: Child) -> None:
        try:
            while not child.cancelled:
                for number, task in waiting.get_nowait():
                    if not child.cancelled:
                        done.put((number, child.run(task, timeout)))
        except queue.Empty:
            return
        except Exception as error:
            done.put(error)
        finally:
            child.close()

    threads = [threading.Thread(target=work, args=(child,)) for child in children]
    for thread in threads:
        thread.start()
    try:
        for _ in range(sum(len(group) for group in groups)):
            outcome = done.get()
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome
    finally:
        for child in children:
            child.cancelled = True
        for thread in threads:
            thread.join()


def gpus() -> list[str]:
    """The GPUs there are, as CUDA's variable names them; none if there is no choice."""
    try:
        import torch
    except ModuleNotFoundError:
        return []
    many = torch.cuda.device_count()
    named = [name for name in os.environ.get(DEVICES, "").split(",") if name]
    return (named or [str(n) for n in range(many)])[:many] if many > 1 else []


def _work(
    gpu: str | None, kernels: list[Kernel], profile: Profile, saved: list[SavedCase], inbox: Any,
    outbox: Any,
) -> None:  # fmt: skip
    if gpu is not None:
        # Before anything asks CUDA, which looks at it once.
        os.environ[DEVICES] = gpu
    from attnspec.conformance.laws import laws
    from attnspec.conformance.runner import Task, run_task

    # An interrupt from the keyboard reaches every process; the parent decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    outbox.put(("ready", None))
    while (order := inbox.get()) is not None:
        number, law, dtype = order
        task = Task(kernels[number], laws()[law], dtype)
        try:
            result = run_task(task, profile, saved, notice=lambda case: outbox.put(("case", case)))
        except Exception as error:
            # Out of memory, or a device that takes no more orders: a fresh process goes on.
            outbox.put(("error", f"stopped by {type(error).__name__}: {error}"[:500]))
            return
        if not _device_is_well(kernels[number]):
            outbox.put(("last", result))
            return
        outbox.put(("result", result))


def _device_is_well(kernel: Kernel) -> bool:
    """False after an error of the device, which stays until the process ends.

    Gives back the memory that the law took: the laws of other processes need it.
    """
    if kernel.device != "cuda":
        return True
    import torch

    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
