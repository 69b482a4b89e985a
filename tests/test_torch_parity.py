"""Networks against PyTorch on the CPU: single passes, and twenty training steps. Ops: test_ops.py.

PyTorch in float64 is the truth. In float64 two right implementations differ by rounding alone, which no wrong formula
does. In float32 the networks are held to PyTorch's own float32 error.
"""

import numpy as np
import pytest

from segnet_scratch.nn.functions import cross_entropy
from segnet_scratch.optim import SGD
from segnet_scratch.segnet import DECODERS, SegNet, SegNetBasic

torch = pytest.importorskip("torch", reason="PyTorch is the oracle here; pip install -e '.[oracle]'")

from torch.nn import functional  # noqa: E402
from torch_segnet import TorchSegNet, TorchSegNetBasic, parameter_groups  # noqa: E402

PEERS = {SegNet: TorchSegNet, SegNetBasic: TorchSegNetBasic}
CLASSES, WIDTH, VOID = 5, 1 / 8, 255


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The maps are small: on a machine that runs other tests too, PyTorch's threads would wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


each_device = pytest.mark.parametrize("device", ["numpy", "host"])
each_network = pytest.mark.parametrize("network", [SegNet, SegNetBasic], ids=lambda network: network.architecture)


def nchw(array, requires_grad=False):
    """A float64 PyTorch tensor of an NHWC (or OHWI) array."""
    contiguous = np.ascontiguousarray(np.moveaxis(array, -1, 1), dtype=np.float64)
    return torch.from_numpy(contiguous).requires_grad_(requires_grad)


def nhwc(tensor_):
    """The NHWC (or OHWI) array of a PyTorch tensor."""
    return np.moveaxis(tensor_.detach().numpy(), 1, -1)


def assert_rounding(actual, expected, units=64):
    """Within `units` roundings of the largest value: sums of up to some thousand terms stay far below 64 here.

    A NaN fails.
    """
    assert actual.shape == tuple(expected.shape)
    expected = np.asarray(expected)
    bound = units * np.finfo(actual.dtype).eps * np.abs(expected).max()
    error = np.abs(actual - expected)
    assert (error <= bound).all(), f"off by {error.max():.3g}, allowed {bound:.3g}"


# --- networks ----------------------------------------------------------------------------------------------------


def with_void(rng, labels, share):
    """uint8 labels, a share of them void."""
    return np.where(rng.random(labels.shape) < share, VOID, labels).astype(np.uint8)


def images_and_labels(rng, n, h, w):
    """Smooth images with some noise, and classes that can be learnt from them: bands of brightness."""
    coarse = torch.from_numpy(rng.standard_normal((n, 3, h // 12 + 2, w // 12 + 2)))
    smooth = nhwc(functional.interpolate(coarse, size=(h, w), mode="bicubic"))
    images = (smooth + 0.1 * rng.standard_normal(smooth.shape)).astype(np.float32)
    bands = np.clip((images.sum(-1) / 2 + 2).astype(int), 0, CLASSES - 1)
    return images, with_void(rng, bands, 0.05)


def he_state(network, seed, decoder="indices"):
    """Weights as training starts from, but for those of transposed convolutions, which are symmetric."""
    state = network(CLASSES, WIDTH, "numpy", seed=seed, decoder=decoder).state_dict()
    for name, array in state.items():
        if ".up." in name:
            array += 0.1 * np.random.default_rng(seed).standard_normal(array.shape)
    return state


def state_off_kinks(network, seed):
    """Random weights under which few values come near a kink of ReLU: batch norm lifts them by two deviations."""
    rng = np.random.default_rng(seed)
    state = he_state(network, seed)
    for name, array in state.items():
        noise = 0.3 * rng.standard_normal(array.shape)
        if name.endswith("bn.bias"):
            array[...] = 2 + noise
        elif name.endswith("bn.weight"):
            array[...] = np.exp(noise)
        elif name.endswith(("running_mean", "classifier.bias")):
            array[...] = noise
        elif name.endswith("running_var"):
            array[...] = np.exp(noise)
    return state


def pass_ours(network, state, images, labels, device, dtype, **options):
    """Logits (NHWC), every gradient and running statistic by name, of one training pass."""
    model = network(CLASSES, WIDTH, device, dtype=dtype, **options)
    model.load_state_dict(state)
    logits = model(images.astype(dtype))
    cross_entropy(logits, labels).backward()
    results = {"logits": logits.numpy()}
    results |= {name: p.grad for name, p in model.named_parameters().items()}
    return results | {name: b.data for name, b in model.named_buffers().items()}


def pass_torch(network, state, images, labels, dtype=torch.float64, memory_format=torch.contiguous_format, **kind):
    """The same of the peer."""
    model = PEERS[network](CLASSES, WIDTH, kind.get("decoder", "indices"))
    model.pool.ceil_mode = kind.get("pooling") != "floor"
    model.load_numpy(state)
    model = model.to(dtype=dtype, memory_format=memory_format)
    logits = model(nchw(images).to(dtype=dtype, memory_format=memory_format))
    functional.cross_entropy(logits, torch.from_numpy(labels).long(), ignore_index=VOID).backward()
    results = {"logits": logits} | {name: p.grad for name, p in model.named_parameters()}
    results |= {name: b for name, b in model.named_buffers() if "num_batches" not in name}
    return {name: nhwc(t) if t.ndim == 4 else t.numpy() for name, t in results.items()}


def relative_errors(results, truth):
    """|result - truth| / |truth| of every array, as Euclidean lengths."""
    assert results.keys() == truth.keys()
    return {name: np.linalg.norm(results[name] - wide) / np.linalg.norm(wide) for name, wide in truth.items()}


@each_device
@each_network
@pytest.mark.parametrize("options", [*({"decoder": kind} for kind in DECODERS), {"pooling": "floor"}], ids=str)
def test_one_pass_in_float64(network, device, options):
    """Logits, the gradient of every parameter and the running statistics, from He's initialisation, at an odd size."""
    state = he_state(network, 0, options.get("decoder", "indices"))
    batch = images_and_labels(np.random.default_rng(0), 2, 45, 37)
    ours = pass_ours(network, state, *batch, device, np.float64, **options)
    errors = relative_errors(ours, pass_torch(network, state, *batch, **options))
    # 25 batch norms in a row amplify roundings (1e-16) about a thousandfold.
    assert {name: e for name, e in errors.items() if not e <= 1e-11} == {}


def nearest_kink(network, state, images):
    """How far from 0 the inputs of every ReLU are, and how far from a tie the two largest values of any pool window.

    Windows of zeros are ties, but certain ones.
    """
    distances = []
    model = PEERS[network](CLASSES, WIDTH).double()
    model.load_numpy(state)

    def before_relu(_, arguments):
        distances.append(arguments[0].abs().min().item())

    def before_pool(_, arguments):
        (x,) = arguments
        odd = x.shape[3] % 2, x.shape[2] % 2
        padded = functional.pad(x, (0, odd[0], 0, odd[1]), value=-torch.inf)
        windows = functional.unfold(padded.flatten(0, 1)[:, None], 2, stride=2)
        first, second = windows.topk(2, dim=1).values.unbind(1)
        distances.append((first - second)[first > 0].min().item())

    for module in model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.register_forward_pre_hook(before_relu)
        elif isinstance(module, torch.nn.MaxPool2d):
            module.register_forward_pre_hook(before_pool)
    model(nchw(images))
    return min(distances)


@each_device
@each_network
def test_one_pass_in_float32(network, device):
    """Our float32 error is that of PyTorch, for logits, the gradient of every parameter and running statistics.

    Both are samples of the same rounding noise, taken in different orders of summation, so neither bounds the other:
    3 times PyTorch's error covers the spread (up to 2.0 over 14 seeds), and 8 roundings are granted where PyTorch
    happens to be right to the last bit. Where a value lies on a kink (ReLU at 0, two equal maxima in a pool window) a
    rounding decides what follows, in any implementation; the weights are such that none does.
    """
    state = state_off_kinks(network, seed=1)
    images, labels = images_and_labels(np.random.default_rng(1), 2, 45, 37)
    kink = nearest_kink(network, state, images)
    assert kink > 1e-5, "roundings on the way to a kink reach 1e-6: choose another seed"
    truth = pass_torch(network, state, images, labels)
    ours = relative_errors(pass_ours(network, state, images, labels, device, np.float32), truth)
    theirs = [
        relative_errors(pass_torch(network, state, images, labels, torch.float32, memory_format), truth)
        for memory_format in (torch.contiguous_format, torch.channels_last)
    ]
    floor = 8 * np.finfo(np.float32).eps
    bounds = {name: 3 * max(errors[name] for errors in theirs) + floor for name in truth}
    assert {name: (ours[name], bounds[name]) for name in truth if not ours[name] <= bounds[name]} == {}


@each_device
@each_network
def test_evaluation_without_dropout(network, device):
    """A model with dropout layers computes in evaluation mode what PyTorch's model without them does."""
    state = state_off_kinks(network, seed=1)
    images, _ = images_and_labels(np.random.default_rng(1), 1, 37, 45)
    model = network(CLASSES, WIDTH, device, dropout=True, dtype=np.float64)
    model.load_state_dict(state)
    peer = PEERS[network](CLASSES, WIDTH)
    peer.load_numpy(state)
    with torch.no_grad():
        expected = peer.double().eval()(nchw(images))
    assert_rounding(model.eval()(images.astype(np.float64)).numpy(), nhwc(expected), units=1000)
    assert all(np.array_equal(a, state[name]) for name, a in model.state_dict().items()), "evaluation changed the model"


# --- training ----------------------------------------------------------------------------------------------------
#
# In float32 two right implementations of SegNet part from He's initialisation: a rounding error flips which pixel of
# a window is the maximum, the unpool moves a value by a pixel, and batch norms over the few pixels of the deep stages
# carry that everywhere. Losses of 20 steps at width 1/8, batch 2, 45x37, lr 1e-3, relative to PyTorch in float64, the
# largest of three seeds: ours float32 1.7e-2, PyTorch float32 2.1e-2, PyTorch channels_last 2.2e-2, and PyTorch in
# float64 with its initial weights off by 1e-7 1.1e-2. Larger maps (batch 4, 96x96) still give 4e-3, a tenth of the
# learning rate 8e-3. In float64 an agreement is a matter of the seed: PyTorch against itself with weights off by 1e-16
# gives 1e-14 (seeds 0, 2, 3, 4, 5) to 2e-8 (seed 1). Hence float64 from a seed that PyTorch itself follows, and
# float32 where few values lie near a kink. SegNet-Basic, shallow and without ReLU in its decoder, needs no such care.

STEPS, LR, DECAY = 20, 1e-3, 5e-4


def batches(seed, n=2, h=45, w=37):
    rng = np.random.default_rng(seed)
    return [images_and_labels(rng, n, h, w) for _ in range(STEPS)]


def train_ours(network, state, data, device, dtype, lr=LR):
    """The losses of the steps."""
    model = network(CLASSES, WIDTH, device, dtype=dtype)
    model.load_state_dict(state)
    optimiser = SGD(model, momentum=0.9, decay=DECAY)
    losses = []
    for images, labels in data:
        model.zero_grad()
        loss = cross_entropy(model(images.astype(dtype)), labels)
        loss.backward()
        optimiser.step(lr)
        losses.append(loss.item())
    return np.array(losses)


def train_torch(network, state, data, lr=LR, perturbation=0.0):
    """The losses of the peer in float64, its weights perturbed by a relative amount first."""
    rng = np.random.default_rng(9)
    model = PEERS[network](CLASSES, WIDTH).double()
    model.load_numpy(state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + perturbation * torch.from_numpy(rng.standard_normal(tuple(parameter.shape)))
    optimiser = torch.optim.SGD(parameter_groups(model, DECAY), lr=lr, momentum=0.9)
    losses = []
    for images, labels in data:
        optimiser.zero_grad()
        loss = functional.cross_entropy(model(nchw(images)), torch.from_numpy(labels).long(), ignore_index=VOID)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return np.array(losses)


def parting(losses, expected):
    """The largest relative difference; NaN where a loss is none."""
    return np.abs(losses / expected - 1).max()


def test_twenty_steps_of_segnet_in_float64():
    """The host device is held to NumPy in as many steps: test_train.py."""
    state, data = he_state(SegNet, seed=2), batches(2)
    expected = train_torch(SegNet, state, data)
    assert expected[-1] < 0.95 * expected[0], "nothing was learnt, so nothing was compared"
    assert parting(train_torch(SegNet, state, data, perturbation=1e-12), expected) < 1e-9, "choose another seed"
    assert parting(train_ours(SegNet, state, data, "numpy", np.float64), expected) <= 1e-9


@pytest.mark.parametrize(("device", "seed"), [("numpy", 0), ("numpy", 1), ("numpy", 2), ("host", 0)])
def test_twenty_steps_of_segnet_in_float32(device, seed):
    state, data = state_off_kinks(SegNet, seed), batches(seed)
    expected = train_torch(SegNet, state, data)
    assert expected[-1] < 0.8 * expected[0], "nothing was learnt, so nothing was compared"
    assert parting(train_ours(SegNet, state, data, device, np.float32), expected) <= 1e-3


def test_twenty_steps_of_segnet_basic_in_float32():
    state, data = he_state(SegNetBasic, seed=0), batches(0, 2, 33, 29)
    expected = train_torch(SegNetBasic, state, data, lr=1e-2)
    assert expected[-1] < 0.8 * expected[0], "nothing was learnt, so nothing was compared"
    assert parting(train_ours(SegNetBasic, state, data, "numpy", np.float32, lr=1e-2), expected) <= 1e-3


def test_pytorch_parts_from_itself():
    """Why float32 is compared off the kinks only: a change of 1e-7 in He's weights is more than 1e-3 in the losses."""
    state, data = he_state(SegNet, seed=0), batches(0)
    expected = train_torch(SegNet, state, data)
    assert parting(train_torch(SegNet, state, data, perturbation=1e-7), expected) > 1e-3
