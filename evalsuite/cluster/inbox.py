"""Where all answers of a cluster arrive: waiting costs the same for one worker and for a thousand."""

import queue
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from evalsuite.cluster.dispatch import Event
from evalsuite.core.errors import first_line

Reader = Callable[..., Iterable[Event]]


class Inbox:
    """What Ray has answered, and who reads it."""

    def __init__(self) -> None:
        self._answers: queue.SimpleQueue[tuple[Reader, tuple[Any, ...], Future[Any]]] = queue.SimpleQueue()

    def expect(self, ref: Any, reader: Reader, *what: Any) -> None:
        """Call ``reader(*what, future)`` once Ray has answered, in a later `read`.

        Args:
            ref: a Ray ``ObjectRef``.
        """
        ref.future().add_done_callback(lambda future: self._answers.put((reader, what, future)))

    def read(self, most_s: float) -> list[Event]:
        """Wait for an answer, but no longer than `most_s`; then what all that are there mean."""
        answers: list[tuple[Reader, tuple[Any, ...], Future[Any]]] = []
        with suppress(queue.Empty):
            answers.append(self._answers.get(timeout=most_s))
            while True:
                answers.append(self._answers.get_nowait())
        return [event for reader, what, future in answers for event in reader(*what, future)]


def reason_of(error: BaseException) -> str:
    """Ray's errors say what happened in their first line and why in a later one."""
    lines = [line.strip() for line in str(error).splitlines()]
    why = next((line for line in lines if line.startswith(("The actor is dead", "The actor died be"))), None)
    return (why or first_line(error)).partition(". ")[0].rstrip(".")
