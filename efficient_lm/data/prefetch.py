"""Batches made ready ahead of time: in a thread of the host, and on the devices."""

import atexit
import collections
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax

from efficient_lm.data.batch import Batch
from efficient_lm.errors import DataError


@runtime_checkable
class BatchIterator(Protocol):
    """Endless batches; `get_state` is JSON-able and `set_state` goes on from it exactly."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


class HostIterator:
    """A grain iterator of batches whose state says what it is a position in.

    Args:
      dataset: a grain IterDataset of batches.
      kind: of data and packing; a state of another kind is refused.
    """

    def __init__(self, dataset, kind: str):
        self._iterator, self._kind = iter(dataset), kind
        atexit.register(_end, weakref.ref(self))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        return {"kind": self._kind, "position": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        if state.get("kind") != self._kind:
            raise DataError(
                f"the saved position is one in {state.get('kind')!r}, the data is now "
                f"{self._kind!r}; restore config.data, or start in a new work directory"
            )
        self._iterator.set_state(state["position"])


def in_thread(make_iterator: Callable[[], BatchIterator], size: int):
    """A grain IterDataset of the batches of an iterator, made `size` ahead in a thread.

    Args:
      make_iterator: makes a fresh iterator, from its beginning.
      size: batches kept ready.
    """
    import grain

    class Batches(grain.DatasetIterator):
        def __init__(self):
            super().__init__()
            self._iterator = make_iterator()

        def __next__(self):
            return next(self._iterator)

        def get_state(self):
            return self._iterator.get_state()

        def set_state(self, state):
            self._iterator.set_state(state)

    class Dataset(grain.IterDataset):
        def __iter__(self):
            return Batches()

    return grain.experimental.ThreadPrefetchIterDataset(Dataset(), prefetch_buffer_size=size)


def _end(reference: weakref.ref) -> None:
    """Destroy a grain iterator at exit, while the modules that its destructor needs are there."""
    host = reference()
    if host is not None:
        host._iterator.close()
        del host._iterator


def prefetch_to_device(
    iterator: BatchIterator,
    place: Callable[[Batch], dict[str, jax.Array]],
    size: int,
) -> "DevicePrefetch":
    """The batches of `iterator` as device arrays, `size` of them put on the devices ahead.

    Args:
      iterator: yields this process's rows of each global batch.
      place: puts them on the devices.
      size: batches kept ready on the device; 0: each is put when asked for.
    """
    return DevicePrefetch(iterator, place, size)


class DevicePrefetch:
    """Iterator of `prefetch_to_device`.

    Its state is that after the batch last handed out, whatever is prefetched beyond it.
    """

    def __init__(self, iterator, place, size: int):
        self._iterator, self._place, self._size = iterator, place, size
        self._ready: collections.deque = collections.deque()  # (device batch, state after it)
        self._state = iterator.get_state()

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        while len(self._ready) <= self._size:
            try:
                batch = next(self._iterator)
            except StopIteration:
                break
            self._ready.append((self._place(batch), self._iterator.get_state()))
        if not self._ready:
            raise StopIteration
        arrays, self._state = self._ready.popleft()
        return arrays

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)
        self._ready.clear()
        self._state = state
