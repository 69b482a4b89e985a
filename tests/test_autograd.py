import gc
import weakref

import numpy as np
import pytest
from support import raises

from segnet_scratch.errors import DeviceError, DTypeError, SegnetError, ShapeError
from segnet_scratch.nn.autograd import Function, Tensor, no_grad, tensor
from segnet_scratch.nn.functions import add, batch_norm, conv2d, cross_entropy, dropout, max_pool, max_unpool, relu
from segnet_scratch.runtime.devices import HostDevice, get_device

NUMPY = get_device("numpy")
each_device = pytest.mark.parametrize("device", ["numpy", "host"])


class Scale(Function):
    """y = factor x; notes when its backward runs."""

    def __init__(self, device, factor, log, name):
        super().__init__(device)
        self.factor, self.log, self.name = factor, log, name

    def forward(self, x):
        self.saved = x
        return x * self.factor

    def backward(self, dy):
        self.log.append(self.name)
        return (dy * self.factor,)


def scaled(x, factor, log=None, name=""):
    return Scale(x.device, factor, [] if log is None else log, name)(x)


def leaf(values, device="numpy", dtype=np.float64):
    return tensor(np.array(values, dtype), device, requires_grad=True)


class TestTensor:
    def test_numbers_become_float32_and_float64_stays(self):
        for device in ("numpy", "host"):
            assert tensor([1, 2], device).dtype == np.float32
            assert tensor(np.array([1, 2]), device).dtype == np.float32
            assert tensor(np.array([1, 2], np.float16), device).dtype == np.float32
            assert tensor(np.array([True]), device).dtype == np.float32
            assert tensor(np.array([1.0, 2.0]), device).dtype == np.float64
            assert tensor([1.0], device).dtype == np.float64

    def test_views_become_contiguous(self):
        x = tensor(np.arange(6.0).reshape(2, 3).T, "numpy")
        assert x.data.flags.c_contiguous
        np.testing.assert_array_equal(x.numpy(), [[0, 3], [1, 4], [2, 5]])

    def test_what_is_no_array_of_the_device(self):
        for data in ([1.0], 1.0, None):
            with pytest.raises(DeviceError, match=r"no array of the numpy device; use tensor\(...\)"):
                Tensor(data, NUMPY)

    def test_item_and_repr(self):
        assert tensor([[2.5]], "numpy").item() == 2.5
        with pytest.raises(ShapeError, match=r"item\(\) needs a tensor of one element, this one has shape \(2,\)"):
            tensor([1, 2], "numpy").item()
        assert repr(tensor([1, 2], "host")) == "Tensor(shape=(2,), dtype=float32, device=host)"


class TestOrder:
    def test_a_chain_runs_from_the_loss_to_the_leaves(self):
        log, x = [], leaf([1.0, 2.0])
        y = x
        for name in "abc":
            y = scaled(y, 2.0, log, name)
        y.backward(np.ones(2))
        assert log == ["c", "b", "a"]
        np.testing.assert_array_equal(x.grad, [8, 8])

    @pytest.mark.parametrize("swapped", [False, True])
    def test_a_function_waits_for_all_that_use_its_output(self, swapped):
        # x -> a -> {b -> c, d}: whichever branch is walked first, a must see the sum of both.
        log, x = [], leaf([1.0])
        a = scaled(x, 3.0, log, "a")
        short, long = scaled(a, 5.0, log, "d"), scaled(scaled(a, 7.0, log, "b"), 11.0, log, "c")
        (add(long, short) if swapped else add(short, long)).backward()
        assert log.count("a") == 1
        assert log[-1] == "a"
        np.testing.assert_array_equal(x.grad, [3 * (5 + 77)])

    @pytest.mark.parametrize("swapped", [False, True])
    def test_a_diamond_of_diamonds(self, swapped):
        x = leaf([2.0])
        y = x
        for _ in range(10):  # 2^10 paths: each function must run once all the same
            left, right = scaled(y, 1.0), scaled(y, 2.0)
            y = add(right, left) if swapped else add(left, right)
        y.backward()
        np.testing.assert_array_equal(x.grad, [3.0**10])

    @each_device
    def test_a_tensor_used_twice_by_one_function(self, device):
        x = leaf([1.0, -2.0], device)
        add(x, x).backward(x.device.upload(np.array([3.0, 5.0])))
        np.testing.assert_array_equal(x.grad, [6, 10])

    @each_device
    def test_a_tensor_used_by_several_functions(self, device):
        x = leaf([[1.0, -2.0]], device)
        y = add(relu(x), add(x, scaled(x, 10.0)))
        y.backward(x.device.upload(np.ones((1, 2))))
        np.testing.assert_array_equal(x.grad, [[12, 11]])

    def test_depth_is_no_recursion(self):
        x = leaf([1.0])
        y = x
        for _ in range(20_000):
            y = scaled(y, 1.0)
        y.backward()
        np.testing.assert_array_equal(x.grad, [1])
        y = x
        for _ in range(20_000):
            y = scaled(y, 1.0)
        del y  # without a backward the chain is freed at once


class TestGradients:
    def test_a_scalar_needs_no_gradient(self):
        x = leaf([[3.0]])
        scaled(x, 2.0).backward()
        np.testing.assert_array_equal(x.grad, [[2]])
        with pytest.raises(ShapeError, match=r"backward\(\) without a gradient needs a tensor of one element"):
            scaled(leaf([1.0, 2.0]), 2.0).backward()

    def test_gradients_accumulate(self):
        x = leaf([1.0, 2.0])
        for _ in range(3):
            scaled(x, 2.0).backward(np.ones(2))
        np.testing.assert_array_equal(x.grad, [6, 6])
        x.grad = None
        scaled(x, 5.0).backward(np.ones(2))
        np.testing.assert_array_equal(x.grad, [5, 5])

    def test_accumulation_leaves_earlier_gradients_alone(self):
        a, b = leaf([1.0]), leaf([1.0])
        add(a, b).backward()
        first = a.grad
        assert b.grad is first  # both are dy: nothing may be added in place
        scaled(a, 2.0).backward()
        np.testing.assert_array_equal(first, [1])
        np.testing.assert_array_equal(a.grad, [3])
        np.testing.assert_array_equal(b.grad, [1])

    def test_only_leaves_that_ask_get_one(self):
        x, constant = leaf([1.0]), tensor([2.0], "numpy")
        middle = add(x, constant)
        scaled(middle, 2.0).backward()
        assert constant.grad is None
        assert middle.grad is None
        np.testing.assert_array_equal(x.grad, [2])

    def test_a_leaf_is_its_own_graph(self):
        x = leaf([1.0, 2.0])
        x.backward(np.array([3.0, 4.0]))
        np.testing.assert_array_equal(x.grad, [3, 4])

    def test_a_function_may_have_no_gradient_for_an_input(self):
        class Ignore(Function):
            def forward(self, a, b):
                return a + b

            def backward(self, dy):
                return dy, None

        log, a, b = [], leaf([1.0]), leaf([1.0])
        Ignore(NUMPY)(a, scaled(b, 2.0, log, "never")).backward()
        np.testing.assert_array_equal(a.grad, [1])
        assert b.grad is None
        assert log == []

    def test_the_wrong_number_of_gradients(self):
        class Wrong(Scale):
            def backward(self, dy):
                return dy, dy

        with pytest.raises(ValueError, match="zip"):
            Wrong(NUMPY, 1.0, [], "")(leaf([1.0])).backward()

    @each_device
    def test_a_gradient_that_does_not_fit(self, device):
        x = leaf([[1.0, 2.0]], device)
        y = add(x, x)
        cases = [
            (np.ones((2, 1)), ShapeError, r"gradient has shape \(2, 1\), expected \(1, 2\)"),
            (np.ones(2), ShapeError, r"shape \(2,\)"),
            (np.ones((1, 2), np.float32), DTypeError, "element type float32, expected float64"),
            ([[1.0, 1.0]], DeviceError, f"no array of the {device} device"),
        ]
        for gradient, error, message in cases:
            with pytest.raises(error, match=message):
                y.backward(gradient)
        assert x.grad is None
        y.backward(np.ones((1, 2)))  # a refused gradient has not used up the graph
        np.testing.assert_array_equal(x.grad, [[2, 2]])

    def test_nothing_to_differentiate(self):
        for y in (tensor([1.0], "numpy"), scaled(tensor([1.0], "numpy"), 2.0)):
            with pytest.raises(SegnetError, match="depends on nothing that requires a gradient"):
                y.backward()


class TestNoGrad:
    def test_no_graph(self):
        x = leaf([1.0])
        with no_grad():
            y = scaled(x, 2.0)
        assert y.grad_fn is None
        assert not y.requires_grad
        assert scaled(x, 2.0).grad_fn is not None

    def test_nests_and_ends_with_an_error(self):
        x = leaf([1.0])

        def fail():
            with no_grad():
                raise KeyError

        with no_grad():
            with no_grad():
                pass
            assert scaled(x, 2.0).grad_fn is None
            with pytest.raises(KeyError):
                fail()
            assert scaled(x, 2.0).grad_fn is None
        assert scaled(x, 2.0).grad_fn is not None
        with pytest.raises(KeyError):
            fail()
        assert scaled(x, 2.0).grad_fn is not None

    def test_its_result_is_a_constant(self):
        x = leaf([3.0])
        with no_grad():
            y = scaled(x, 2.0)
        add(y, x).backward()
        np.testing.assert_array_equal(x.grad, [1])


class TestOnceOnly:
    def test_twice_is_an_error(self):
        x = leaf([1.0])
        y = scaled(x, 2.0)
        y.backward()
        with pytest.raises(SegnetError, match=r"already gone through this graph and freed it; run forward again"):
            y.backward()
        np.testing.assert_array_equal(x.grad, [2])

    def test_a_second_loss_on_a_freed_part_is_an_error(self):
        x, log = leaf([1.0]), []
        shared = scaled(x, 2.0, log, "shared")
        first, second = scaled(shared, 3.0, log, "first"), scaled(shared, 5.0, log, "second")
        first.backward()
        with pytest.raises(SegnetError, match="already gone"):
            second.backward()
        assert log == ["first", "shared"]
        np.testing.assert_array_equal(x.grad, [6])

    def test_memory_is_freed_while_backward_proceeds(self):
        class Watch(Scale):
            def backward(self, dy):
                self.log.append([ref() is None for ref in saved])
                return super().backward(dy)

        gc.disable()  # references alone must do it
        try:
            log, saved = [], []
            y = leaf(np.ones(3))
            x = y
            for name in "abcd":
                y = Watch(NUMPY, 2.0, log, name)(y)
                saved.append(weakref.ref(y.data))
            y.backward(np.ones(3))
            # When the backward of a begins, what c and d saved is gone; the last output is still held by y.
            assert log[-2][1:] == [True, True, False]
            assert [ref() is None for ref in saved] == [True, True, True, False]
            np.testing.assert_array_equal(x.grad, [16] * 3)
        finally:
            gc.enable()

    @each_device
    def test_saved_arrays_go_with_the_graph(self, device):
        home = get_device(device)
        rng = np.random.default_rng(0)
        gc.disable()
        try:
            x = leaf(rng.standard_normal((1, 6, 6, 3)), device)
            weight, gain, shift = (
                leaf(rng.standard_normal((4, 3, 3, 3)), device),
                leaf(np.ones(4), device),
                leaf(np.zeros(4), device),
            )
            running = home.zeros((4,), np.float64), home.upload(np.ones(4))
            h = conv2d(x, weight, padding=1)
            refs = [weakref.ref(h.data)]
            h = relu(batch_norm(h, gain, shift, *running, training=True))
            refs.append(weakref.ref(h.data))
            h, codes = max_pool(h)
            refs.append(weakref.ref(codes.codes))
            h = dropout(max_unpool(h, codes), 0.5, 0, home.upload(np.array([1, 2], np.uint64)))
            refs.append(weakref.ref(h.data))
            loss = cross_entropy(h, rng.integers(0, 4, (1, 6, 6)))
            del h, codes
            assert all(ref() is not None for ref in refs[:3])
            loss.backward()
            assert all(ref() is None for ref in refs)
            assert all(t.grad is not None and np.isfinite(t.grad).all() for t in (x, weight, gain, shift))
        finally:
            gc.enable()

    def test_a_graph_without_backward_is_freed_with_its_result(self):
        gc.disable()
        try:
            y = relu(leaf(np.ones(3)))
            ref = weakref.ref(y.data)
            y = scaled(y, 2.0)
            assert ref() is not None
            del y
            assert ref() is None
        finally:
            gc.enable()

    def test_a_result_that_no_function_saves_is_freed_at_once(self):
        x = leaf([1.0, -1.0])
        y = scaled(x, 2.0)
        ref = weakref.ref(y.data)
        y = relu(y)  # saves its own output
        assert ref() is None
        y.backward(np.array([3.0, 3.0]))
        np.testing.assert_array_equal(x.grad, [6, 0])


class TestRefused:
    def test_tensors_of_two_devices(self):
        a, b = tensor([1.0], "numpy"), tensor([1.0], "host")
        with pytest.raises(
            DeviceError, match="Arithmetic: input 1 is on host, expected numpy; create both on one device"
        ):
            add(a, b)
        other = Tensor(np.ones(1), HostDevice())  # two devices of one name are two devices
        with pytest.raises(DeviceError, match="input 1"):
            add(b, other)

    @each_device
    def test_arrays_that_do_not_fit(self, device):
        """What ops refuse reaches whoever calls a function; the rest of it: test_ops.py."""
        home = get_device(device)
        x, y64 = (tensor(np.zeros((1, 4, 4, 3), dtype), device) for dtype in (np.float32, np.float64))
        refused = [
            (lambda: add(x, y64), DTypeError, "add_forward: b has element type float64, expected float32"),
            (lambda: x * y64, DTypeError, "arithmetic_forward: b has element type float64, expected float32"),
            (lambda: x + tensor(np.zeros((4, 3, 3), np.float32), device), ShapeError, "(4, 3, 3) do not fit"),
            (lambda: x.sum(4), ShapeError, "sum over axis 4"),
            (lambda: x * "3", DTypeError, "expected real numbers"),
            (lambda: conv2d(x, tensor(np.zeros((2, 3, 3, 3)), device)), DTypeError, "weight has element type float64"),
            (lambda: dropout(x, 1.5, 0, home.zeros((2,), np.uint64)), ShapeError, "p is 1.5"),
            (lambda: relu(Tensor(np.zeros((4, 6), np.float32)[:, ::2], home)), ShapeError, "is a view"),
        ]
        for call, error, message in refused:
            with raises(error, message):
                call()


class TestArithmetic:
    @each_device
    @pytest.mark.parametrize(
        ("of_a", "of_b"),
        [
            ((2, 3, 4), (2, 3, 4)),
            ((2, 3, 4), (4,)),
            ((3, 1), (2, 1, 4)),
            ((2, 1, 4, 1), (3, 1, 5)),
            ((), (2, 3)),
            ((1, 1), (1,)),
            ((2, 1, 3, 1, 2), (1, 2, 1, 2, 2)),
            ((300, 2), (1, 2)),  # sums of several chunks
        ],
    )
    def test_values_are_those_of_numpy_and_gradients_those_of_differences(self, of_a, of_b, device):
        rng = np.random.default_rng([*of_a, 7, *of_b])
        a, b = rng.uniform(0.5, 2, of_a), rng.uniform(0.5, 2, of_b)

        def objective(a, b, exp=np.exp, log=np.log):
            y = (2 - a) * b / (a + b) + 3 / a - (-b) ** 2 + a**0.5 - a**-1.5 + exp(-a) * log(b) - (b - 1) / of_numbers
            return (y * y).sum() / 8 + y.sum(0).mean()

        of_numbers = rng.uniform(1, 2, of_b)  # a NumPy array among tensors
        x, y = tensor(a, device, requires_grad=True), tensor(b, device, requires_grad=True)
        result = objective(x, y, Tensor.exp, Tensor.log)
        assert result.item() == pytest.approx(objective(a, b), rel=1e-13)
        result.backward()
        for leaf, along in ((x, lambda d: objective(a + d, b)), (y, lambda d: objective(a, b + d))):
            direction = rng.standard_normal(leaf.shape)
            numeric = (along(1e-5 * direction) - along(-1e-5 * direction)) / 2e-5
            assert leaf.grad.shape == leaf.shape
            assert float((leaf.grad * direction).sum()) == pytest.approx(numeric, rel=1e-6, abs=1e-7)

    @each_device
    @pytest.mark.parametrize("axis", [None, 0, -1, 1, (0, 2), (1, 2), (-1, 0), (0, 1, 2), ()])
    @pytest.mark.parametrize("keepdims", [False, True])
    def test_sum_and_mean_over_any_axes(self, axis, keepdims, device):
        a = np.random.default_rng(3).standard_normal((3, 1, 4))
        x = leaf(a, device)
        for name in ("sum", "mean"):
            y, expected = getattr(x, name)(axis, keepdims), getattr(a, name)(axis=axis, keepdims=keepdims)
            assert y.shape == expected.shape
            np.testing.assert_allclose(y.numpy(), expected, rtol=1e-13)
        share = y.data.size / a.size
        y.backward(get_device(device).upload(np.full(y.shape, 3.0)))
        np.testing.assert_allclose(x.grad, np.full(a.shape, 3.0 * share))

    def test_what_numpy_has_to_the_left_is_left_to_the_tensor(self):
        for left in (np.float64(2), np.array([2.0, 3.0]), np.float32(2), 2, True):
            for y in (left + leaf([1, 2]), left - leaf([1, 2]), left * leaf([1, 2]), left / leaf([1, 2])):
                assert isinstance(y, Tensor)
                assert y.dtype == np.float64
        assert (leaf([1.0], dtype=np.float32) * np.array([2.0])).dtype == np.float32
