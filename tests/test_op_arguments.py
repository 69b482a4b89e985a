"""What the ops take as their namesakes in the field do, and what they refuse by name: options, weights, odd arrays."""

import numpy as np
import pytest

from segnet_scratch import SegNet
from segnet_scratch.errors import ConfigError, DataError, DTypeError, SegnetError, ShapeError
from segnet_scratch.nn import functions
from segnet_scratch.nn.autograd import Tensor, tensor
from segnet_scratch.ops.loss.cross_entropy import CrossEntropyForward
from segnet_scratch.ops.op import VOID, spec
from segnet_scratch.runtime.devices import get_device
from segnet_scratch.step import TrainingStep

each_device = pytest.mark.parametrize("device", ["numpy", "host"])


def logits_and_labels(classes=5, void=VOID):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, classes, (2, 4, 3))
    labels[rng.random(labels.shape) < 0.3] = void
    return rng.standard_normal((*labels.shape, classes)), labels


def of_pytorch(logits, labels, **options):
    """Loss and gradient by PyTorch, classes last."""
    torch = pytest.importorskip("torch")
    z = torch.from_numpy(logits).requires_grad_()
    weight = options.pop("weight", None)
    weight = None if weight is None else torch.as_tensor(weight, dtype=torch.float64)
    target = torch.from_numpy(labels).long()
    loss = torch.nn.functional.cross_entropy(z.movedim(-1, 1), target, weight=weight, **options)
    loss.sum().backward()
    return loss.detach().numpy(), z.grad.numpy()


class TestLoss:
    @each_device
    @pytest.mark.parametrize("ignored", [VOID, -100, 2, 4000])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_as_pytorch(self, device, ignored, reduction):
        logits, labels = logits_and_labels(void=ignored)
        weights = [0.5, 0.0, 2.0, 1.0, 3.0]
        expected, gradient = of_pytorch(
            logits, labels, weight=weights, ignore_index=ignored, reduction=reduction, label_smoothing=0.1
        )
        z = tensor(logits, device, requires_grad=True)
        loss = functions.cross_entropy(z, labels, weights, smoothing=0.1, reduction=reduction, ignore_index=ignored)
        loss.sum().backward()
        np.testing.assert_allclose(loss.numpy(), np.reshape(expected, loss.shape), rtol=1e-12)
        np.testing.assert_allclose(z.device.download(z.grad), gradient, rtol=1e-10, atol=1e-14)

    def test_a_sum_over_nothing_is_0(self):
        logits, labels = logits_and_labels()
        z = tensor(logits, "numpy")
        assert functions.cross_entropy(z, np.full_like(labels, VOID), reduction="sum").item() == 0

    def test_labels_that_are_no_class(self):
        logits, labels = logits_and_labels()
        with pytest.raises(DataError, match=r"label 255 at .* expected 0 to 4, or -1 for void"):
            functions.cross_entropy(tensor(logits, "numpy"), labels, ignore_index=-1)
        with pytest.raises(ShapeError, match="reduction 'average'; expected one of mean, sum, none"):
            functions.cross_entropy(tensor(logits, "numpy"), labels, reduction="average")

    WEIGHTS = (
        ("negative", [1, 1, -1, 1, 1], ConfigError, "-1 for class 2; expected numbers of at least 0"),
        ("NaN", [1, 1, 1, np.nan, 1], ConfigError, "nan for class 3"),
        ("infinite", np.array([np.inf, 1, 1, 1, 1]), ConfigError, "inf for class 0"),
        ("complex", [1, 1, 1, 1, 1j], ConfigError, "for class 4"),
        ("all 0", np.zeros(5, np.float32), ConfigError, "nothing but 0"),
        ("too few", [1, 1], ShapeError, r"has shape \(2,\), expected \(5,\)"),
        ("a column", np.ones((5, 1)), ShapeError, r"has shape \(5, 1\)"),
    )

    @each_device
    @pytest.mark.parametrize(("weights", "error", "message"), [w[1:] for w in WEIGHTS], ids=[w[0] for w in WEIGHTS])
    def test_class_weights_that_cannot_be(self, device, weights, error, message):
        logits, labels = logits_and_labels()
        with pytest.raises(error, match=message):
            functions.cross_entropy(tensor(logits, device), labels, weights)

    @pytest.mark.parametrize("engine", ["layers", "fused"])
    def test_and_those_of_a_training_step(self, engine):
        with pytest.raises(ConfigError, match=r"-1.0 for class 1"):
            TrainingStep(SegNet(5, 0.125, "numpy"), engine, class_weights=np.array([1, -1.0, 1, 1, 1]))

    @each_device
    def test_weights_that_slip_through_show_in_the_loss(self, device):
        """Where nobody can look at them, on a GPU: a loss of 0 would hide them from the guard against NaN."""
        op = CrossEntropyForward.plan(spec((4, 2), np.float32))
        arrays = {"logits": np.zeros((4, 2), np.float32), "labels": np.zeros(4, np.uint8)}
        arrays["class_weights"] = np.array([np.nan, 1], np.float32)
        home = get_device(device)
        assert np.isnan(home.download(op(home, **arrays).loss)).all()


class TestBatchNorm:
    @each_device
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("eps", [1e-3, 0.5])
    def test_eps_as_pytorch(self, device, training, eps):
        torch = pytest.importorskip("torch")
        rng = np.random.default_rng(0)
        x, weight, bias, mean = (rng.standard_normal(s) for s in ((2, 5, 4, 3), (3,), (3,), (3,)))
        var = rng.uniform(0.5, 2, 3)
        theirs = [torch.from_numpy(a.copy()) for a in (np.moveaxis(x, -1, 1), mean, var, weight, bias)]
        expected = torch.nn.functional.batch_norm(*theirs, training=training, momentum=0.3, eps=eps)
        ours = [tensor(a, device) for a in (x, weight, bias)]
        running = [ours[0].device.upload(a) for a in (mean, var)]
        y = functions.batch_norm(*ours, *running, training=training, momentum=0.3, eps=eps)
        np.testing.assert_allclose(y.numpy(), np.moveaxis(expected.numpy(), 1, -1), rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(running[1], theirs[2].numpy(), rtol=1e-12)

    @pytest.mark.parametrize("options", [{"eps": -1e-5}, {"eps": np.nan}, {"momentum": 1.5}])
    def test_refused(self, options):
        x, vector = tensor(np.ones((1, 2, 2, 3)), "numpy"), tensor(np.ones(3), "numpy")
        with pytest.raises(ShapeError, match=f"batch_norm: {next(iter(options))} is"):
            functions.batch_norm(x, vector, vector, vector.data, vector.data, training=True, **options)


class TestTensor:
    @pytest.mark.parametrize("values", [1j, np.ones(3, np.complex64), ["a"], None, np.ones(1, "M8[s]")])
    def test_only_real_numbers(self, values):
        with pytest.raises(DTypeError, match=r"tensor: got .* expected real numbers"):
            tensor(values, "numpy")

    def test_rows_of_unlike_lengths(self):
        with pytest.raises(ShapeError, match="rows of one length"):
            tensor([[1], [1, 2]], "numpy")


EMPTY = [(0, 4, 4, 2), (1, 0, 4, 2), (1, 4, 0, 2), (1, 4, 4, 0), (0,), ()]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize(
    "op",
    [
        lambda x, v: functions.cross_entropy(x, np.zeros(x.shape[:-1], np.uint8)),
        lambda x, v: functions.batch_norm(x, v, v, v.data, v.data, training=False),
        lambda x, v: functions.conv2d(x, tensor(np.ones((3, 3, 3, 2)), "numpy")),
        lambda x, v: functions.conv2d(tensor(np.ones((1, 4, 4, 2)), "numpy"), x),
        lambda x, v: functions.conv_transpose2d(x, tensor(np.ones((2, 4, 4, 2)), "numpy"), (8, 8)),
        lambda x, v: functions.max_pool(x),
        lambda x, v: functions.resize_bilinear(x, (3, 3)),
        lambda x, v: SegNet(3, 0.125, "numpy")(x.numpy()),
    ],
    ids=["cross_entropy", "batch_norm", "conv2d", "weight of conv2d", "conv_transpose2d", "max_pool", "resize", "net"],
)
def test_arrays_with_an_empty_side_meet_an_error_of_the_project(op, shape):
    x = Tensor(np.ones(shape, np.float32), get_device("numpy"))
    with pytest.raises(SegnetError):
        op(x, tensor(np.ones(shape[-1:], np.float32), "numpy"))
