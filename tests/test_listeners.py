"""Several listeners to one run: each hears everything, in order, and of the end also after an error."""

import inspect
from io import StringIO

import pytest
from rich.console import Console
from support.training import Recorder, start

from segnet_scratch.display import TrainingDisplay
from segnet_scratch.run_record import RunRecord, read_sessions
from segnet_scratch.train import Listener

EVENTS = [name for name, value in vars(Listener).items() if inspect.isfunction(value) and not name.startswith("_")]


def test_each_hears_what_one_alone_hears(sample, tmp_path):
    recorders = [Recorder(), Recorder()]
    assert start(sample, tmp_path, batch=4, epochs=1).run(*recorders)
    assert recorders[0].told == recorders[1].told == ["started", 1, 2, *["validating"] * 4, recorders[0].told[-1]]
    assert recorders[0].told[-1].images == 4


def test_every_event_reaches_every_listener_in_order(sample, tmp_path):
    """Also one that Listener gains later; numpy compiles nothing."""
    told, listeners = [], (Listener(), Listener())
    for number, listener in enumerate(listeners):
        for name in EVENTS:
            setattr(listener, name, lambda *what, number=number, name=name: told.append((number, name, what)))
    trainer = start(sample, tmp_path, batch=4, epochs=1)
    trainer.run(*listeners)
    trainer._tell(Listener.compiling, 1, 2)
    heard = [[(name, what) for number, name, what in told if number == one] for one in (0, 1)]
    assert heard[0] == heard[1]
    order = {name: [number for number, event, _ in told if event == name] for name in EVENTS}
    assert order.pop("ended") == [1, 0]  # as contexts end: the last one first
    assert len(order) >= 5
    assert all(numbers and numbers == [0, 1] * (len(numbers) // 2) for numbers in order.values())


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


def test_a_run_that_fails_leaves_no_bar_and_a_record_of_its_last_step(sample, tmp_path):
    display, live = TrainingDisplay(Console(file=StringIO(), force_terminal=True)), []

    class Fails(Listener):
        def stepped(self, trainer, loss, lr):
            live.append(display._progress.live.is_started)
            if trainer.step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(sample, tmp_path, steps=5).run(display, RunRecord(), Fails())
    assert live == [True, True]
    assert not display._progress.live.is_started
    assert read_sessions(tmp_path)[0].last_step == 2
