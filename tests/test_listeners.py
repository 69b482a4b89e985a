"""Several listeners to one run: each hears everything, in order, and each context is closed."""

import inspect

import pytest
from support.training import Recorder

from segnet_scratch.config import Config
from segnet_scratch.listeners import Listeners
from segnet_scratch.train import Listener, Trainer


def test_each_hears_what_one_alone_hears(sample, tmp_path):
    config = Config(model="segnet-basic", width=0.0625, size=32, batch=4, epochs=1, workers=0)
    recorders = [Recorder(), Recorder()]
    Trainer(config, sample, tmp_path, "numpy").run(Listeners(recorders))
    assert recorders[0].told == recorders[1].told == ["started", 1, 2, *["validating"] * 4, recorders[0].told[-1]]
    assert recorders[0].told[-1].images == 4


def test_every_event_of_training_is_passed_on():
    """Also one that Listener gains later."""
    events = [name for name, value in vars(Listener).items() if inspect.isfunction(value) and not name.startswith("_")]
    assert len(events) >= 4
    for name in events:
        told = []
        listeners = [Listener(), Listener()]
        for number, listener in enumerate(listeners):
            setattr(listener, name, lambda *arguments, number=number, told=told: told.append((number, arguments)))
        arguments = tuple(range(len(inspect.signature(getattr(Listener, name)).parameters) - 1))
        getattr(Listeners(listeners), name)(*arguments)
        assert told == [(0, arguments), (1, arguments)]


def test_contexts_are_entered_and_left_also_after_an_error():
    log = []

    class Display(Listener):
        def __enter__(self):
            log.append("in")
            return self

        def __exit__(self, *_):
            log.append("out")

    def interrupted():
        with Listeners([Display(), Recorder(), Display()]):
            assert log == ["in", "in"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert log == ["in", "in", "out", "out"]
