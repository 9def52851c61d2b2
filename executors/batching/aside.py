"""Work beside the step loop, so that no step waits for it: pictures are begun in one thread, decoded in another.

On a GPU each thread has a stream of its own, so that its kernels run between and under those of the steps. What a thread makes is
whole when it is taken: nobody waits on the device for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Literal

import torch

Kind = Literal["begin", "decode"]


class Aside:
    """One piece of work of each kind at a time. All methods are for the thread that steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._streams: dict[str, Any] = {}
        self._under_way: dict[str, Future[Any]] = {}

    def busy(self, kind: Kind) -> bool:
        """Whether work of a kind is under way, or done and not taken."""
        return kind in self._under_way

    def start(self, kind: Kind, work: Callable[[], Any]) -> None:
        """Begin a piece of work; it sees what the calling thread has put on the device so far."""
        assert kind not in self._under_way
        if kind not in self._threads:
            self._threads[kind] = ThreadPoolExecutor(1, thread_name_prefix=kind, initializer=self._settle)
            if self._device.type == "cuda":
                self._streams[kind] = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        seen = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        self._under_way[kind] = self._threads[kind].submit(self._run, kind, work, seen)

    def take(self, kind: Kind) -> Any:
        """Return what work of a kind has made, or raise what it raised; None while it is under way or when there is none."""
        done = self._under_way.get(kind)
        if done is None or not done.done():
            return None
        del self._under_way[kind]
        return done.result()

    def hand_over(self, tensors: Iterable[torch.Tensor | None]) -> None:
        """Tell the device's allocator that the stepping thread uses tensors that another one made."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            for tensor in tensors:
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(stream)

    def wait(self, timeout_s: float) -> None:
        """Wait until something can be taken, or no longer than that."""
        if self._under_way:
            wait(self._under_way.values(), timeout_s, FIRST_COMPLETED)

    def close(self) -> None:
        """Let the threads end after what is under way; nothing is taken any more."""
        for thread in self._threads.values():
            thread.shutdown(wait=False, cancel_futures=True)

    def _settle(self) -> None:
        if self._device.type == "cpu":
            torch.set_num_threads(1)  # Each thread has a number of its own; the Pod's is one.

    def _run(self, kind: Kind, work: Callable[[], Any], seen: Any) -> Any:
        if seen is None:
            return work()
        stream = self._streams[kind]
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            stream.wait_event(seen)
            made = work()
            stream.synchronize()
        return made
