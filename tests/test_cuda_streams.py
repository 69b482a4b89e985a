"""Copies beside compute, graphs and running out of memory on the cuda device, against the stand-in for CuPy: it finds
accesses that no event orders (fake_streams.py). How fast any of it is takes a GPU: scripts/gpu_check.sh."""

import weakref

import numpy as np
import pytest
from support import FULL, count
from support.fake_cupy import FakeCupy
from support.fake_streams import Event, Race, Stream
from support.kernels import FLOAT32, needs_compiler

from segnet_scratch.config import Config
from segnet_scratch.data import Loader
from segnet_scratch.errors import DataError, DeviceError, DeviceMemoryError
from segnet_scratch.nn.autograd import Tensor
from segnet_scratch.nn.functions import cross_entropy
from segnet_scratch.optim import SGD
from segnet_scratch.runtime.devices import CudaDevice, HostDevice, NumpyDevice, get_device
from segnet_scratch.runtime.devices.graph import Recording
from segnet_scratch.runtime.devices.prefetch import Prefetcher
from segnet_scratch.runtime.launch import launch
from segnet_scratch.segnet import SegNetBasic
from segnet_scratch.train import Trainer


def batches(count, shape=(2, 3, 5), seed=0):
    rng = np.random.default_rng(seed)
    for index in range(count):
        yield index, rng.standard_normal(shape).astype(np.float32), rng.integers(0, 255, shape[:2]).astype(np.uint8)


def arrays_of(item):
    return item[1:]


class TestPrefetch:
    @pytest.mark.parametrize("kind", [NumpyDevice, pytest.param(HostDevice, marks=needs_compiler), CudaDevice])
    @pytest.mark.parametrize("count", [0, 1, 2, 7])
    def test_every_batch_arrives(self, cupy, kind, count):
        device = kind()
        expected = batches(count)
        taken = 0
        for item, arrays in device.prefetch(batches(count), arrays_of):
            for array, values in zip(arrays, next(expected)[1:], strict=True):
                assert device.owns(array)
                assert array.dtype == values.dtype
                np.testing.assert_array_equal(device.download(array), values)
            assert item[0] == taken
            taken += 1
        assert taken == count

    def test_copies_are_pinned_on_a_stream_of_their_own_and_nobody_waits(self, dry_cupy):
        device = CudaDevice()
        read(device, 6)
        assert len(dry_cupy.copies) == 12
        assert all(stream != 0 and pinned for stream, pinned in dry_cupy.copies)
        # For each copy the thread waits for the one before in its slot; the end waits once; a slot is made once.
        assert dry_cupy.synchronisations == 6 + 1 + 2

    def test_memory_that_earlier_work_may_still_use(self, dry_cupy):
        device = CudaDevice()
        for _ in range(2):  # the second one allocates while kernels of the first may run
            read(device, 3)

    def test_the_next_batch_is_on_its_way_while_one_is_worked_on(self, dry_cupy):
        device, asked = CudaDevice(), []

        def counted():
            for item in batches(5):
                asked.append(item[0])
                yield item

        found = [(item[0], asked[-1]) for item, _ in device.prefetch(counted(), arrays_of)]
        assert found == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 4)]

    def test_memory_is_used_again_until_a_batch_is_larger(self, dry_cupy):
        device = CudaDevice()
        sizes = [(2, 3, 5), (2, 3, 5), (1, 3, 5), (2, 3, 5), (4, 3, 5), (4, 3, 5), (1, 1, 1)]
        items = [next(batches(1, size)) for size in sizes]
        addresses = []
        for item, arrays in device.prefetch(iter(items), arrays_of):
            addresses.append(device.address(arrays[0]))
            np.testing.assert_array_equal(device.download(arrays[0]), item[1])
        assert addresses[0] == addresses[2]
        assert addresses[1] == addresses[3]
        assert addresses[4] == addresses[6]
        assert len(set(addresses)) == 4

    def test_an_error_comes_where_its_batch_would_have(self, dry_cupy):
        def broken():
            yield from batches(2)
            raise DataError("image 2 is damaged")

        uploaded = CudaDevice().prefetch(broken(), arrays_of)
        assert [next(uploaded)[0][0] for _ in range(2)] == [0, 1]
        with pytest.raises(DataError, match="image 2 is damaged"):
            next(uploaded)

    def test_stopping_early_waits_for_what_is_on_its_way(self, dry_cupy):
        device = CudaDevice()
        for _ in range(5):
            ahead = device.prefetch(batches(4), arrays_of)
            next(ahead)
            ahead.close()
        dry_cupy.timeline.finish()


class TestBranches:
    """Two streams in one recording."""

    @pytest.fixture
    def device(self, dry_cupy):
        self.cupy = dry_cupy
        device = CudaDevice()
        self.memory = device.zeros((90,), np.float32)
        launch(device, "relu_forward", 1, 32, (self.memory[:30], self.memory[30:60], 30), FLOAT32)  # loads it
        return device

    def beside(self, device, first, second, join=True):
        """A graph of three launches x -> y, two of which are beside each other."""

        def relu(x, y):
            launch(device, "relu_forward", 1, 32, (self.memory[x : x + 15], self.memory[y : y + 15], 15), FLOAT32)

        def step():
            relu(0, 15)
            with device.side_stream():
                relu(*first)
            relu(*second)
            if join:
                device.join()
            relu(0, 15)

        return device.capture(step)

    @pytest.mark.parametrize(("first", "second"), [((15, 30), (15, 45)), ((0, 30), (45, 60))])
    def test_branches_that_do_not_touch(self, device, first, second):
        replay = self.beside(device, first, second)
        for _ in range(3):
            replay()
        self.cupy.timeline.finish()

    @pytest.mark.parametrize(("first", "second"), [((15, 30), (30, 45)), ((0, 30), (60, 44)), ((15, 31), (0, 20))])
    def test_branches_that_race(self, device, first, second):
        with pytest.raises(Race, match=r"relu_forward on stream \d+ (reads|writes) what stream \d+ may still be using"):
            self.beside(device, first, second)()

    def test_a_branch_that_nobody_waits_for(self, device):
        with pytest.raises(AssertionError, match="StreamCaptureUnjoined"):
            self.beside(device, (15, 30), (15, 45), join=False)

    def test_a_branch_that_does_not_wait(self, device, monkeypatch):
        wait = Stream.wait_event
        waits = []  # the first one is the branch's: without it, it is no part of the recording

        def wait_but_once(stream, event):
            waits.append(stream)
            if len(waits) > 1:
                wait(stream, event)

        monkeypatch.setattr(Stream, "wait_event", wait_but_once)
        with pytest.raises(Race, match="may still be using"):
            self.beside(device, (15, 30), (15, 45))()


def read(device, count):
    """Launches a kernel on each batch, as a training step does."""
    y = device.empty((2, 3, 5), np.float32)
    for _, (x, _) in device.prefetch(batches(count), arrays_of):
        launch(device, "relu_forward", 1, 32, (x, y, 30), FLOAT32)


class TestPrefetchIsWatched:
    """Each wait is left out once: the stand-in must notice."""

    @pytest.fixture
    def device(self, monkeypatch, tmp_path):
        self.cupy = FakeCupy(dry=True).install(monkeypatch, tmp_path)
        return CudaDevice()

    def test_compute_that_does_not_wait_for_the_copy(self, device, monkeypatch):
        wait = Stream.wait_event
        monkeypatch.setattr(Stream, "wait_event", lambda s, e: wait(s, e) if s.number else None)
        with pytest.raises(Race, match="relu_forward on stream 0 reads what stream 1 may still be using"):
            read(device, 1)

    def test_a_copy_that_does_not_wait_for_compute(self, device, monkeypatch):
        wait = Stream.wait_event
        monkeypatch.setattr(Stream, "wait_event", lambda s, e: None if s.number else wait(s, e))
        with pytest.raises(Race, match="copy to the GPU on stream 1 writes what stream 0 may still be using"):
            read(device, 3)

    def test_memory_of_the_pool_that_earlier_work_uses(self, device, monkeypatch):
        read(device, 1)
        monkeypatch.setattr(Event, "record", lambda event, stream=None: None)
        with pytest.raises(Race, match="copy to the GPU on stream 2 writes what stream 0 may still be using"):
            read(device, 1)

    def test_a_thread_that_does_not_wait_for_its_pinned_memory(self, device, monkeypatch):
        monkeypatch.setattr(Event, "synchronize", lambda event: None)
        with pytest.raises(Race, match="pinned memory was overwritten"):
            read(device, 3)

    def test_an_end_that_does_not_wait(self, device, monkeypatch):
        synchronize = Stream.synchronize
        monkeypatch.setattr(Stream, "synchronize", lambda s: None if s.number else synchronize(s))
        ahead = device.prefetch(batches(4), arrays_of)
        next(ahead)
        ahead.close()
        del ahead
        with pytest.raises(Race, match=r"memory of stream 0 is freed while stream 1|pinned memory was freed"):
            self.cupy.timeline.finish()


def network(device, dropout=False):
    return SegNetBasic(5, 1 / 16, device, seed=1, dropout=dropout)


class Steps:
    """Training steps whose inputs lie in arrays that stay where they are."""

    def __init__(self, device, dropout=True):
        self.device, self.model = device, network(device, dropout)
        self.optimiser = SGD(self.model)
        self.images, self.labels = device.zeros((2, 32, 33, 3), np.float32), device.zeros((2, 32, 33), np.uint8)
        self.rng, self.made = np.random.default_rng(3), 0

    def set_inputs(self):
        device = self.device
        device.write(self.images, self.rng.standard_normal(self.images.shape).astype(np.float32))
        device.write(self.labels, self.rng.integers(0, 5, self.labels.shape).astype(np.uint8))
        self.model.set_random_state(7, self.made)
        self.optimiser.set_rate(1e-2 / (1 + self.made))
        self.made += 1

    def step(self):
        self.model.zero_grad()
        loss = cross_entropy(self.model(Tensor(self.images, self.device)), self.labels)
        loss.backward()
        self.optimiser.update()
        return loss

    def losses(self, step, count):
        found = []
        for _ in range(count):
            self.set_inputs()
            found.append(step().item())
        return found


@needs_compiler
@pytest.mark.usefixtures("multiply_adds")
class TestCapture:
    def test_replays_are_the_steps(self, cupy):
        eager = Steps(HostDevice())
        expected = eager.losses(eager.step, 5)
        device = CudaDevice()
        steps = Steps(device)
        losses = steps.losses(steps.step, 2)
        before = len(cupy.launches)
        replay = device.capture(steps.step)
        assert len(cupy.launches) == before, "recording runs nothing"
        synchronisations = cupy.synchronisations
        losses += steps.losses(replay, 3)
        assert losses == expected
        assert len(set(losses)) == 5
        assert cupy.synchronisations == synchronisations + 3  # of item(), which asks for the loss
        ours, theirs = steps.model.state_dict(), eager.model.state_dict()
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)

    def test_steps_between_replays_do_not_disturb_them(self, cupy):
        eager = Steps(HostDevice())
        expected = eager.losses(eager.step, 6)
        device = CudaDevice()
        steps = Steps(device)
        losses = steps.losses(steps.step, 1)
        replay = device.capture(steps.step)
        for _ in range(2):
            losses += steps.losses(replay, 1) + steps.losses(steps.step, 1)  # the step has gradients elsewhere
        losses += steps.losses(replay, 1)
        assert losses == expected

    def test_a_graph_goes_when_nobody_has_it(self, cupy):
        steps = Steps(CudaDevice())
        steps.losses(steps.step, 1)
        replay = steps.device.capture(steps.step)
        replay()
        graph = weakref.ref(replay)
        del replay
        assert graph() is None

    def test_on_the_cpu_it_is_the_function(self):
        for name in ("numpy", "host"):
            steps = Steps(get_device(name))
            assert steps.device.capture(steps.step) == steps.step


class TestCaptureRefuses:
    @pytest.fixture
    def steps(self, dry_cupy):
        steps = Steps(CudaDevice())
        steps.losses(steps.step, 1)
        return steps

    @pytest.mark.parametrize(
        ("what", "message"),
        [
            (lambda s: s.device.upload(np.zeros(3)), "tries to upload an array"),
            (lambda s: s.device.from_dlpack(np.zeros(3)), "tries to upload an array"),
            (lambda s: s.device.download(s.images), "tries to download an array"),
            (lambda s: s.step().item(), "tries to download an array"),
            (lambda s: s.device.synchronise(), "tries to wait for the GPU"),
            (lambda s: s.optimiser.step(0.1), "tries to write an array of the CPU"),
            (lambda s: s.device.capture(s.step), "tries to capture once more"),
            (lambda s: network(s.device), "tries to upload an array"),
        ],
        ids=["upload", "dlpack", "download", "item", "synchronise", "rate", "capture", "model"],
    )
    def test_what_a_graph_cannot_repeat(self, steps, what, message):
        with pytest.raises(DeviceError, match=message):
            steps.device.capture(lambda: what(steps))
        # The device is as it was, and can record once more.
        assert steps.losses(steps.step, 1)
        steps.device.capture(steps.step)()

    def test_a_kernel_that_has_not_run(self, dry_cupy):
        steps = Steps(CudaDevice())
        with pytest.raises(DeviceError, match=r"tries to launch \w+ for the first time, .*; do it before"):
            steps.device.capture(steps.step)

    def test_memory_that_is_gone(self, steps, dry_cupy):
        """A graph keeps what its function refers to; another array may go, and a replay would read what comes next."""
        device = steps.device
        x, y = (device.zeros((30,), np.float32) for _ in range(2))
        launch(device, "relu_forward", 1, 32, (x, y, 30), FLOAT32)
        lost = [x]

        def function():
            launch(device, "relu_forward", 1, 32, (lost.pop(), y, 30), FLOAT32)

        replay = device.capture(function)
        replay()
        del x
        with pytest.raises(Race, match="relu_forward is replayed on memory that has been freed"):
            replay()

    @needs_compiler
    def test_constants_in_the_pool_of_the_graph(self, cupy, monkeypatch):
        """Proof that they must lie outside: the stand-in's pool hands memory out again, as CuPy's does."""
        device = CudaDevice()
        out, (a, b) = device.zeros((3,), np.float32), (device.upload(np.full(3, k, np.float32)) for k in (1, 2))
        values = np.full(3, 10, np.float32)

        def function():
            sums = device.empty((3,), np.float32)
            launch(device, "add_forward", 1, 32, (a, b, sums, 3), FLOAT32)
            del sums
            launch(device, "add_forward", 1, 32, (a, device.constant(values), out, 3), FLOAT32)

        function()
        replay = device.capture(function)
        replay()
        np.testing.assert_array_equal(device.download(out), 11)

        def inside(recording, values):
            target = recording._cupy.empty(values.shape, values.dtype)
            recording._constants.append((target, values))
            return target

        monkeypatch.setattr(Recording, "constant", inside)
        replay = device.capture(function)
        replay()
        np.testing.assert_array_equal(device.download(out), 4)

    def test_out_of_memory_while_recording(self, steps, dry_cupy):
        before = dry_cupy.common_pool.in_use
        dry_cupy.fails_at = dry_cupy.allocations + 20
        with pytest.raises(DeviceMemoryError, match="out of memory"):
            steps.device.capture(steps.step)
        assert dry_cupy.common_pool.in_use <= before
        assert steps.losses(steps.device.capture(steps.step), 2)


SETTINGS = {"model": "segnet-basic", "width": 1 / 16, "size": 32, "batch": 4, "workers": 0, "epochs": 500}


class TestTraining:
    """The trainer on the cuda device, with the sample data."""

    def trainer(self, sample, out, **settings):
        return Trainer(Config(**SETTINGS | settings), sample, out, "cuda")

    @pytest.fixture
    def cuda(self, monkeypatch):
        """get_device("cuda") without memory of other tests."""
        monkeypatch.setattr("segnet_scratch.runtime.devices._shared_device", lambda name: CudaDevice())

    @needs_compiler
    @pytest.mark.usefixtures("multiply_adds")
    def test_batches_are_copied_beside_compute(self, cupy, cuda, sample, tmp_path):
        trainer = self.trainer(sample, tmp_path / "cuda", epochs=None, steps=2, dropout=True)
        before = len(cupy.copies)
        trainer.run()
        streams = [pinned for stream, pinned in cupy.copies[before:] if stream]
        assert streams == [True] * 6  # images and labels of two batches; images of a rehearsal and of the validation
        host = Trainer(trainer.config, sample, tmp_path / "host", "host")
        host.run()
        for name in ("metrics.jsonl", "last.safetensors"):
            assert (tmp_path / "cuda" / name).read_bytes() == (tmp_path / "host" / name).read_bytes()

    def one_step(self, trainer):
        """A step by hand: dry kernels give no finite loss."""
        images, labels = next(
            (b.images, b.labels) for b in Loader(trainer.train_set, trainer.loader.transform, 4, workers=0).epoch(0)
        )
        model = trainer.model.train()
        model.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        trainer.training.optimiser.step(0.1)
        loss.item()

    def test_memory_does_not_grow(self, dry_cupy, cuda, sample, tmp_path):
        trainer = self.trainer(sample, tmp_path / "run")
        device, sizes = trainer.model.device, set()
        items = ((0, np.zeros((2, 32, 32, 3), np.float32), np.zeros((2, 32, 32), np.uint8)) for _ in iter(int, 1))
        for step, (_, (images, labels)) in zip(range(count(30, 1000)), device.prefetch(items, arrays_of), strict=False):
            model = trainer.model.train()
            model.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            trainer.training.optimiser.step(0.1)
            loss.item()
            del loss
            if step > 1:
                sizes.add(dry_cupy.common_pool.in_use)
        assert len(sizes) == 1

    def test_any_allocation_may_fail(self, dry_cupy, cuda, sample, tmp_path):
        trainer = self.trainer(sample, tmp_path / "run")
        self.one_step(trainer)
        trainer.model.zero_grad()
        live, before = dry_cupy.common_pool.in_use, dry_cupy.allocations
        self.one_step(trainer)
        needed = dry_cupy.allocations - before
        assert needed > 100
        # Every one of the first 200, as far as a step has so many, or every seventh.
        for n in range(1, min(needed, 200) + 1, 1 if FULL else 7):
            dry_cupy.fails_at = dry_cupy.allocations + n
            with pytest.raises(DeviceMemoryError, match=r"out of memory: .* allocating [\d,]+ bytes") as caught:
                self.one_step(trainer)
            assert caught.value.asked > 0
            del caught
            self.one_step(trainer)
            trainer.model.zero_grad()
            assert dry_cupy.common_pool.in_use == live, f"after allocation {n} failed"

    @pytest.mark.parametrize(
        ("settings", "advice"),
        [
            ({"engine": "layers"}, r"a batch of 4 at 32x32 .*: try --set batch=2, or --set accumulate=2$"),
            ({"engine": "fused", "width": 0.125}, r"a batch of 4 at 32x32 is too large here: try --set batch=2$"),
            ({"batch": 1}, r"a batch of 1 at 32x32 .* smaller size or width, such as --set width=0.03125$"),
        ],
    )
    def test_a_smaller_batch_is_suggested(self, dry_cupy, cuda, sample, tmp_path, settings, advice):
        trainer = self.trainer(sample, tmp_path / "run", **settings)
        for n in (1, 2, 3, 4, 9, 40):  # the first eight are the prefetcher's: pinned memory and the GPU's, two slots
            dry_cupy.fails_at = dry_cupy.allocations + n
            with pytest.raises(DeviceMemoryError, match=advice) as caught:
                trainer.run()
            assert caught.value.asked > 0


def test_what_a_step_came_to_arrives_where_no_memory_can_be_pinned(cupy):
    device = CudaDevice()
    arrays = [device.upload(np.full(1, value, np.float32)) for value in (3, 4)]
    cupy.fails_at = cupy.allocations + 1
    assert [float(array[0]) for array in device.download_async(arrays).get()] == [3, 4]


@needs_compiler
def test_labels_of_parts_are_counted_where_they_are(cupy, sample, tmp_path, monkeypatch):
    """A download would stop the GPU at each step."""
    monkeypatch.setattr("segnet_scratch.runtime.devices._shared_device", lambda name: CudaDevice())
    config = Config(
        model="segnet-basic", size=32, batch=2, width=1 / 16, steps=2, accumulate=2, val_split="none", workers=0
    )
    downloaded, download = [], CudaDevice.download
    monkeypatch.setattr(
        CudaDevice, "download", lambda self, array: (downloaded.append(array.dtype), download(self, array))[1]
    )
    trainer = Trainer(config, sample, tmp_path / "run", "cuda")
    trainer.run()
    assert np.uint8 not in downloaded


def test_a_prefetcher_that_gets_no_pinned_memory(dry_cupy):
    dry_cupy.fails_at = dry_cupy.allocations + 1
    device = CudaDevice()
    with pytest.raises(DeviceMemoryError, match="120 bytes of the computer's memory cannot be pinned"):
        next(Prefetcher(dry_cupy, device.empty).run(batches(1), arrays_of))
