"""The fused engine against the layers: the same losses, gradients and logits from fewer, larger kernels."""

import functools

import numpy as np
import pytest

from segnet_scratch import no_grad
from segnet_scratch.config import Config, load_config
from segnet_scratch.engine.arena import Arena
from segnet_scratch.engine.convolutions import Convolutions
from segnet_scratch.engine.inference import FoldedWeights, FusedInference, InferenceProgram
from segnet_scratch.engine.ledger import accounts
from segnet_scratch.engine.network import Network
from segnet_scratch.engine.training import Objective, TrainingProgram
from segnet_scratch.engine.weights import WorkingWeights
from segnet_scratch.errors import ConfigError
from segnet_scratch.inference_step import InferenceStep
from segnet_scratch.ops.convolution.tile_table import TileTable
from segnet_scratch.runtime.devices import CudaDevice, HostDevice, get_device
from segnet_scratch.segnet import SegNet, SegNetBasic
from segnet_scratch.step import TrainingStep

CLASSES = 21
NARROW = {"segnet": (SegNet, 0.125, (37, 45)), "segnet-basic": (SegNetBasic, 0.125, (17, 24))}
DEVICES = "numpy", "host"


def build(name, device="numpy", **options):
    network, width, size = NARROW[name]
    return network(CLASSES, width, device, seed=1, **options), size


def batch(rng, size, n=2):
    images = rng.standard_normal((n, *size, 3)).astype(np.float32)
    labels = rng.integers(0, CLASSES, (n, *size)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.1] = 255
    return images, labels


def gradients(model):
    return {name: model.device.download(p.grad) for name, p in model.named_parameters().items()}


def flat(arrays):
    return np.concatenate([np.ravel(array).astype(np.float64) for array in arrays.values()])


def distance(a, b):
    """Of two sets of gradients, relative to the second."""
    a, b = flat(a), flat(b)
    assert np.isfinite(a).all()
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


class Training:
    """One engine's training step."""

    def __init__(self, engine, name, device="numpy", precision="float32", objective=(), noise=0.0, seed=0, **options):
        self.model, self.size = build(name, device, **options)
        rng = np.random.default_rng(seed)
        for parameter in self.model.parameters():
            if len(parameter.shape) == 4:
                factor = (1 + noise * rng.uniform(-1, 1, parameter.shape)).astype(parameter.dtype)
                self.model.device.write(parameter.data, parameter.numpy() * factor)
        weights, *rest = objective or ((),)
        settings = Config(**dict(zip(("loss_normalisation", "label_smoothing"), rest, strict=False)))
        self.step = TrainingStep(self.model, engine, precision, settings, weights)

    def loss(self, images, labels):
        self.logits = self.step.gradients(images.astype(self.model.dtype), labels)[..., :CLASSES]
        return self.step.read().get()[0]

    def losses(self, batches, lr):
        found = []
        for images, labels in batches:
            self.step(images, labels, lr)
            found.append(self.step.read().get()[0])
        return np.array(found)


Layers, Fused = (functools.partial(Training, engine) for engine in ("layers", "fused"))


class TestGradients:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("name", NARROW)
    def test_in_float32_they_are_those_of_the_layers(self, name, device):
        rng = np.random.default_rng(3)
        weights = rng.uniform(0.5, 2, CLASSES).astype(np.float32)
        objective = (weights, "valid", 0.1)
        layers, fused = (engine(name, device, objective=objective) for engine in (Layers, Fused))
        images, labels = batch(rng, layers.size)
        expected = layers.loss(images, labels)
        assert fused.loss(images, labels) == pytest.approx(expected, rel=2e-6)
        assert distance({"logits": fused.logits}, {"logits": layers.logits}) < 1e-4
        # What rounding makes of SegNet's gradients: the layers in float32 against themselves in double.
        double = Layers(name, objective=objective, dtype=np.float64)
        double.loss(images, labels)
        explained = distance(gradients(layers.model), gradients(double.model))
        assert distance(gradients(fused.model), gradients(double.model)) <= 4 * explained + 1e-5
        for engine in (fused, layers):
            engine.losses([(images, labels)], 0.01)
        ours, theirs = fused.model.named_buffers(), layers.model.named_buffers()
        for key in ours:
            np.testing.assert_allclose(ours[key].data, theirs[key].data, rtol=1e-4, atol=1e-5, err_msg=key)

    @pytest.mark.parametrize("name", NARROW)
    def test_in_bfloat16_rounding_explains_the_difference(self, name):
        """A layer rounds weight, y and z forward, dr and dy backward: five times, where the noise below comes once."""
        double, fused = Layers(name, dtype=np.float64), Fused(name, precision="bf16")
        images, labels = batch(np.random.default_rng(4), double.size)
        expected = double.loss(images, labels)
        assert fused.loss(images, labels) == pytest.approx(expected, rel=2e-2)
        of_noise = []
        for seed in range(3):
            noisy = Layers(name, dtype=np.float64, noise=2.0**-9, seed=seed)
            noisy.loss(images, labels)
            of_noise.append(distance(gradients(noisy.model), gradients(double.model)))
        assert distance(gradients(fused.model), gradients(double.model)) <= 5 * np.mean(of_noise)

    def test_kernels_and_numpy_round_to_bfloat16_alike(self):
        numpy, host = (Fused("segnet-basic", device, "bf16") for device in DEVICES)
        images, labels = batch(np.random.default_rng(5), numpy.size)
        assert host.loss(images, labels) == pytest.approx(numpy.loss(images, labels), rel=1e-4)
        assert distance(gradients(host.model), gradients(numpy.model)) < 0.02

    def test_no_valid_pixel(self):
        fused = Fused("segnet-basic", "host", "bf16")
        images, labels = batch(np.random.default_rng(6), fused.size)
        assert fused.loss(images, np.full_like(labels, 255)) == 0
        assert all((gradient == 0).all() for gradient in gradients(fused.model).values())


class TestTraining:
    def run(self, contender, steps=20, seed=7):
        rng = np.random.default_rng(seed)
        return contender.losses((batch(rng, contender.size) for _ in range(steps)), 0.01)

    @pytest.mark.parametrize("device", DEVICES)
    def test_its_steps_stay_with_the_layers(self, device):
        count = 20 if device == "numpy" else 5
        layers, fused = (self.run(engine("segnet-basic", device), count) for engine in (Layers, Fused))
        np.testing.assert_allclose(fused, layers, rtol=1e-4)

    def test_twenty_steps_of_segnet_stay_as_close_as_rounding_lets_them(self):
        """SegNet parts from itself if weights differ by 1e-7 (docs/explanation/numerics.md); the engine no further."""
        layers, fused = self.run(Layers("segnet")), self.run(Fused("segnet"))
        apart = [np.abs(self.run(Layers("segnet", noise=1e-7, seed=seed)) - layers).max() for seed in range(3)]
        assert np.abs(fused - layers).max() <= 3 * max(apart)

    @pytest.mark.parametrize("precision", ["float32", "bf16"])
    def test_the_same_bits_again(self, precision):
        first, second = (self.run(Fused("segnet-basic", "host", precision), steps=3) for _ in range(2))
        np.testing.assert_array_equal(first, second)

    def test_batches_of_another_shape(self):
        layers, fused = Layers("segnet-basic"), Fused("segnet-basic")
        rng = np.random.default_rng(8)
        for n, size in ((2, (17, 24)), (1, (32, 16)), (2, (17, 24))):
            images, labels = batch(rng, size, n)
            assert fused.loss(images, labels) == pytest.approx(layers.loss(images, labels), rel=1e-5)


class Strict(HostDevice):
    """A host device that moves and makes no memory while it is closed."""

    closed = False

    def empty(self, shape, dtype):
        assert not self.closed, "an allocation in a step"
        return super().empty(shape, dtype)

    def upload(self, array):
        assert not self.closed, "an upload in a step"
        return super().upload(array)

    def download(self, array):
        assert not self.closed, "a download in a step"
        return super().download(array)


class TestStep:
    def test_a_step_allocates_nothing_and_waits_for_nothing(self):
        device = Strict()
        step = TrainingStep(SegNetBasic(CLASSES, 0.125, device, seed=1), "fused", "bf16")
        images, labels = batch(np.random.default_rng(9), (17, 24))
        step(images, labels, 0.01)
        device.closed = True
        step(images, labels, 0.01)

    def test_on_the_stand_in_for_a_gpu_it_is_recorded_and_replayed(self, cupy):
        on_host, on_cuda = (Fused("segnet-basic", device, "bf16") for device in (HostDevice(), CudaDevice()))
        rng = np.random.default_rng(10)
        batches = [batch(rng, on_host.size) for _ in range(3)]  # runs, then twice from the graph
        np.testing.assert_array_equal(on_cuda.losses(batches, 0.01), on_host.losses(batches, 0.01))


class TestBranches:
    """Weight gradients on a second stream, against the stand-in for CuPy, which knows which bytes who may still use."""

    def test_a_step_has_the_same_bits_and_no_race(self, cupy, monkeypatch):
        rng = np.random.default_rng(11)
        plain = Fused("segnet-basic", HostDevice(), "bf16")
        batches = [batch(rng, plain.size) for _ in range(3)]  # runs, then twice from the graph
        expected = plain.losses(batches, 0.01)
        monkeypatch.setenv("SEGNET_BRANCHES", "1")
        np.testing.assert_array_equal(Fused("segnet-basic", CudaDevice(), "bf16").losses(batches, 0.01), expected)
        assert len(cupy.timeline.streams) > 3, "the default stream, the recorded one, its branch, branches of replays"

    @pytest.mark.parametrize("blocks", [SegNet.blocks_of(0.25), SegNetBasic.blocks_of(0.5)], ids=["segnet", "basic"])
    def test_nothing_beside_a_branch_is_given_its_memory(self, blocks):
        network = Network(blocks, CLASSES, 2, (32, 32))
        program = TrainingProgram(network, Convolutions("bf16"), Objective(), branches=True)
        arena = Arena.plan(program.lifetimes())
        places = {
            name: (arena.offsets[name], arena.offsets[name] + life.nbytes) for name, life in arena.lifetimes.items()
        }
        side = [number for number, step in enumerate(program.steps) if step.side_stream]
        assert len(side) > len(blocks)
        for number in side:
            own = {name for name in program.steps[number].arrays.values() if name in places}
            beside = [step for step in program.steps[number + 1 : program.join_of(number)] if not step.side_stream]
            for step in beside:
                for name in step.written & places.keys() - own:
                    start, end = places[name]
                    overlapping = [a for a in own if places[a][0] < end and start < places[a][1]]
                    assert overlapping == [], (program.steps[number].op.name, step.op.name)

    def test_an_unknown_switch(self, monkeypatch):
        monkeypatch.setenv("SEGNET_BRANCHES", "yes")
        step = Fused("segnet-basic", HostDevice(), "bf16")
        with pytest.raises(ConfigError, match=r"SEGNET_BRANCHES is 'yes'; expected 1 \(weight gradients on a second"):
            step.losses([batch(np.random.default_rng(0), step.size)], 0.01)


class TestInference:
    @pytest.mark.parametrize("folded", [False, True])
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("name", NARROW)
    def test_logits_are_those_of_the_layers(self, name, device, folded):
        model, size = build(name, device)
        rng = np.random.default_rng(11)
        for key, array in {**model.named_buffers(), **model.named_parameters()}.items():
            if ".bn." in key:
                model.device.write(array.data, rng.uniform(0.5, 1.5, array.data.shape).astype(np.float32))
        images = rng.standard_normal((2, *size, 3)).astype(np.float32)
        model.eval()
        with no_grad():
            expected = model(images).numpy()
        if folded:
            model.fold_batch_norm()
        step = InferenceStep(model, "fused", "float32")
        for _ in range(2):
            logits = model.device.download(step(model.device.upload(images)))
            assert logits.shape == (*expected.shape[:3], 24)
            np.testing.assert_allclose(logits[..., :CLASSES], expected, rtol=0, atol=2e-5 * np.abs(expected).max())
            assert (logits[..., CLASSES:] < -1e29).all()

    @pytest.mark.parametrize("name", NARROW)
    def test_in_bfloat16_rounding_explains_the_difference(self, name):
        model, size = build(name)
        images, _ = batch(np.random.default_rng(12), size)

        def logits(noise=0.0, seed=0):
            layers = Layers(name, noise=noise, seed=seed)
            layers.model.eval()
            with no_grad():
                return layers.model(images).numpy()

        exact = logits()
        of_noise = np.mean([np.linalg.norm(logits(2.0**-9, seed) - exact) for seed in range(3)])
        ours = InferenceStep(model, "fused", "bf16")(images)[..., :CLASSES].astype(np.float32)
        assert np.linalg.norm(ours - exact) <= 5 * of_noise


class TestHopper:
    """The engine with Hopper's kernels, on the host device: at width 1/8 they take the layers of 64 channels."""

    @pytest.fixture
    def with_hopper(self, monkeypatch):
        monkeypatch.setenv("SEGNET_HOPPER", "1")

    @pytest.mark.parametrize(("precision", "loose"), [("bf16", 1), ("float32", 2e-4)])
    def test_a_step_is_that_of_mma_sync_but_for_the_order_of_sums(self, monkeypatch, precision, loose):
        portable = Training("fused", "segnet", "host", precision)
        images, labels = batch(np.random.default_rng(13), portable.size)
        expected = portable.loss(images, labels)
        monkeypatch.setenv("SEGNET_HOPPER", "1")
        hopper, again = (Training("fused", "segnet", "host", precision) for _ in range(2))
        loss = hopper.loss(images, labels)
        assert loss == pytest.approx(expected, rel=1e-3 * loose)
        assert 0 < distance(gradients(hopper.model), gradients(portable.model)) < 0.05 * loose
        for key, buffer in hopper.model.named_buffers().items():
            near, other = 0.02 * loose, portable.model.named_buffers()[key].data
            np.testing.assert_allclose(buffer.data, other, near, near, err_msg=key)
        assert again.loss(images, labels) == loss
        assert distance(gradients(again.model), gradients(hopper.model)) == 0

    def test_its_kernels_are_in_the_step_and_flipped_weights_are_not(self, with_hopper):
        model, size = build("segnet", "host")
        weights = WorkingWeights(model, "bf16")
        program = TrainingProgram(Network.of(model, 2, size), weights.convolutions, Objective())
        of_layer = {}
        for step in program.steps:
            if step.op.name.startswith("conv2d_hopper"):
                of_layer.setdefault(step.layer, []).append(step.op.name.removeprefix("conv2d_hopper_"))
        convolutions = {name: p.shape for name, p in model.named_parameters().items() if len(p.shape) == 4}
        whole = {name for name, shape in convolutions.items() if shape in ((64, 3, 3, 64), (32, 3, 3, 64))}
        assert {f"{layer}.conv.weight" for layer in of_layer} == whole
        assert all(sorted(ops) == ["backward_data", "backward_weight", "forward"] for ops in of_layer.values())
        assert not whole & weights.flipped.keys()
        assert not whole & WorkingWeights(model, "tf32").flipped.keys()

    @pytest.mark.parametrize("rung", ["tf32", "tf32x3"])
    def test_what_is_left_to_split(self, with_hopper, rung):
        """Maps and weights come in planes; the gradient of the logits is split for dgrad and wgrad, z of inference."""
        network, kernels = Network(SegNet.blocks_of(1.0), CLASSES, 16, (224, 224)), Convolutions(rung, TileTable({}))
        programs = TrainingProgram(network, kernels, Objective()), InferenceProgram(network, kernels)
        training, inference = (
            [step.arrays["x"] for step in program.steps if step.op.name == "split_planes"] for program in programs
        )
        assert training == ["dlogits"]
        assert len(set(inference)) == len(inference)
        assert all(name.endswith(".z") for name in inference)
        model, _ = build("segnet", "host")
        for given in (WorkingWeights(model, rung).arrays(), FoldedWeights(model, rung).arrays):
            assert any(name.endswith(".weight.planes") for name in given)

    def test_inference(self, monkeypatch):
        model, size = build("segnet", "host")
        images, _ = batch(np.random.default_rng(14), size)
        expected = InferenceStep(model, "fused", "bf16")(images)[..., :CLASSES].astype(np.float32)
        monkeypatch.setenv("SEGNET_HOPPER", "1")
        fused = FusedInference(model, FoldedWeights(model, "bf16"), 2, size)
        assert any(step.op.name == "conv2d_hopper_forward" and step.op.pool for step in fused.program.steps)
        fused.images[...] = images
        logits = fused.run()[..., :CLASSES].astype(np.float32)
        assert np.linalg.norm(logits - expected) <= 0.05 * np.linalg.norm(expected)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"decoder": "bilinear"}, "decoder of this network is 'bilinear'"),
            ({"dropout": True}, "has no dropout"),
            ({"dtype": np.float64}, "parameters in float32, and those of this network are float64"),
        ],
    )
    def test_networks_that_it_does_not_compute(self, options, message):
        model, _ = build("segnet", **options)
        with pytest.raises(ConfigError, match=f'{message}.*set engine = "layers"'):
            WorkingWeights(model, "tf32x3")

    def test_channels_that_are_no_whole_pieces(self):
        model = SegNet(CLASSES, 0.2, "numpy")
        with pytest.raises(ConfigError, match=r"pieces of 8 channels, and encoder\.1\.1 has 13 at width 0\.2"):
            WorkingWeights(model, "bf16")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (["engine=layers", "precision=bf16"], 'add engine = "fused"'),
            (["engine=fused", "accumulate=2"], "expected accumulate = 1"),
            (["engine=fast"], '"layers" or "fused"'),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ConfigError, match=message):
            load_config(None, settings)


class TestLedger:
    @pytest.mark.parametrize(("n", "size"), [(16, (224, 224)), (8, (360, 480))])
    def test_training_in_bfloat16_needs_at_most_half_of_pytorch_on_paper(self, n, size):
        fused, layers, torch = accounts(Network(SegNet.blocks_of(1.0), CLASSES, n, size), get_device("numpy"), "bf16")
        assert fused.peak <= torch.peak / 2
        assert fused.peak <= layers.peak / 2
        # Worked by hand for PyTorch: y and z of 25 convolutions, 2 bytes each.
        assert torch.entries["convolution outputs"] == torch.entries["activations"]
        assert torch.entries["indices"] == 32 * fused_indices(n, size)

    def test_the_arena_is_as_small_as_any_could_be(self):
        network = Network(SegNet.blocks_of(1.0), CLASSES, 16, (224, 224))
        program = TrainingProgram(network, Convolutions("bf16"), Objective())
        arena = Arena.plan(program.lifetimes())
        assert arena.nbytes == max(sum(arena.alive(step).values()) for step in range(len(program.steps)))


def fused_indices(n, size):
    """Bytes of all packed codes: a quarter of a byte for each pooled value."""
    total, (h, w) = 0, size
    for channels in (64, 128, 256, 512, 512):
        h, w = (h + 1) // 2, (w + 1) // 2
        total += n * h * w * channels // 4
    return total
