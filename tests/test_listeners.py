"""Several listeners to one run: each hears everything, in order, and of the end also after an error."""

import inspect

import pytest
from support.training import Recorder, start

from segnet_scratch.train import Listener

EVENTS = [name for name, value in vars(Listener).items() if inspect.isfunction(value) and not name.startswith("_")]


def test_each_hears_what_one_alone_hears(sample, tmp_path):
    recorders = [Recorder(), Recorder()]
    assert start(sample, tmp_path, batch=4, epochs=1).run(*recorders)
    assert recorders[0].told == recorders[1].told == ["started", 1, 2, *["validating"] * 4, recorders[0].told[-1]]
    assert recorders[0].told[-1].images == 4


def test_every_event_reaches_every_listener_in_order(sample, tmp_path):
    """Also one that Listener gains later; numpy compiles nothing."""
    told = []

    def noting(number):
        listener = Listener()
        for name in EVENTS:
            setattr(listener, name, lambda *arguments, name=name: told.append((name, number, arguments)))
        return listener

    trainer = start(sample, tmp_path, batch=4, epochs=1)
    trainer.run(noting(0), noting(1))
    trainer._tell(Listener.compiling, 1, 2)
    assert {name for name, *_ in told} == set(EVENTS)
    assert len(EVENTS) >= 6
    ends = [entry for entry in told if entry[0] == "ended"]
    assert [number for _, number, _ in ends] == [1, 0]  # as contexts end, the last one first
    told = [entry for entry in told if entry[0] != "ended"]
    for (name, first, one), (other, second, two) in zip(told[::2], told[1::2], strict=True):
        assert (name, first, one) == (other, second - 1, two)


@pytest.mark.parametrize("interrupted", [False, True])
def test_whoever_heard_the_beginning_hears_the_end_also_after_an_error(sample, tmp_path, interrupted):
    log = []

    class Display(Listener):
        def __init__(self, begins=True):
            self.begins = begins

        def started(self, trainer):
            if not self.begins:
                raise KeyboardInterrupt
            log.append("in")

        def stepped(self, trainer, loss, lr):
            raise KeyboardInterrupt

        def ended(self, trainer):
            log.append("out")

    with pytest.raises(KeyboardInterrupt):
        start(sample, tmp_path, steps=2).run(Display(), Recorder(), Display(begins=interrupted))
    assert log == (["in", "in", "out", "out"] if interrupted else ["in", "out"])
