"""Several listeners to one training run."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack

from segnet_scratch.evaluate import Evaluation
from segnet_scratch.train import Listener, Trainer


class Listeners(Listener):
    """Passes every event on to each of several listeners, in their order. As a context it is that of all of them."""

    def __init__(self, listeners: Iterable[Listener]) -> None:
        self._listeners = tuple(listeners)
        self._contexts = ExitStack()

    def __enter__(self) -> "Listeners":
        for listener in self._listeners:
            if isinstance(listener, AbstractContextManager):
                self._contexts.enter_context(listener)
        return self

    def __exit__(self, *_: object) -> None:
        self._contexts.close()

    def started(self, trainer: Trainer) -> None:
        for listener in self._listeners:
            listener.started(trainer)

    def stepped(self, trainer: Trainer, loss: float, lr: float) -> None:
        for listener in self._listeners:
            listener.stepped(trainer, loss, lr)

    def compiling(self, done: int, total: int) -> None:
        for listener in self._listeners:
            listener.compiling(done, total)

    def validating(self, images: int) -> None:
        for listener in self._listeners:
            listener.validating(images)

    def validated(self, trainer: Trainer, evaluation: Evaluation) -> None:
        for listener in self._listeners:
            listener.validated(trainer, evaluation)
