"""The decoders that the paper sets against the pooling indices: interpolation, and a learned transposed convolution."""

import weakref

import numpy as np
import pytest

from segnet_scratch import SegNet, SegNetBasic, load, tensor, weights
from segnet_scratch.config import Config
from segnet_scratch.convert import from_pytorch, to_pytorch
from segnet_scratch.errors import CheckpointError, ConfigError, DTypeError, ShapeError
from segnet_scratch.nn.autograd import no_grad
from segnet_scratch.nn.functions import conv_transpose2d, cross_entropy, max_pool, resize_bilinear
from segnet_scratch.ops.convolution.conv_transpose2d import bilinear_weight
from segnet_scratch.runtime.devices import get_device
from segnet_scratch.segnet import DECODERS, build

NARROW = 1 / 16
OTHERS = ("bilinear", "deconv")

each_device = pytest.mark.parametrize("device", ["numpy", "host"])
each_decoder = pytest.mark.parametrize("decoder", DECODERS)
each_other = pytest.mark.parametrize("decoder", OTHERS)
each_network = pytest.mark.parametrize("network", [SegNet, SegNetBasic], ids=lambda network: network.architecture)


def images(n=2, height=33, width=47, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((n, height, width, 3)).astype(dtype)


def one_pass(model, seed=0):
    """Logits and every gradient of a training pass at an odd size."""
    labels = np.random.default_rng(seed).integers(0, model.classes, (2, 33, 47)).astype(np.uint8)
    model.zero_grad()
    logits = model(images(seed=seed, dtype=model.dtype))
    cross_entropy(logits, labels).backward()
    return {"logits": logits.numpy()} | {name: p.grad for name, p in model.named_parameters().items()}


# The operations


@each_device
@pytest.mark.parametrize("size", [(8, 6), (7, 9), (1, 1), (2, 11)], ids=str)
def test_a_fresh_deconv_interpolates_bilinearly_away_from_the_border(device, size):
    x = np.random.default_rng(0).standard_normal((2, (size[0] + 1) // 2, (size[1] + 1) // 2, 3))
    learned = conv_transpose2d(tensor(x, device), tensor(bilinear_weight(3), device), size).numpy()
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # zeros beyond the border, and exactly twice as large
    doubled = 2 * padded.shape[1], 2 * padded.shape[2]
    fixed = resize_bilinear(tensor(padded, device), doubled).numpy()[:, 2 : 2 + size[0], 2 : 2 + size[1]]
    np.testing.assert_allclose(learned, fixed, rtol=0, atol=1e-14)


@each_device
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [(8, 6), (7, 9), (1, 5), (13, 2)], ids=str)
def test_the_operations_against_pytorch(device, dtype, size):
    torch = pytest.importorskip("torch")
    from torch.nn import functional

    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, (size[0] + 1) // 2, (size[1] + 1) // 2, 5)).astype(dtype)
    weight = rng.standard_normal((5, 4, 4, 7)).astype(dtype)

    def theirs(array):
        return torch.tensor(np.moveaxis(array, 3, 1).astype(np.float64), requires_grad=True)

    def compare(ours, expected, leaves):
        dy = rng.standard_normal(ours.shape).astype(dtype)
        ours.backward(device_of.upload(dy))
        expected.backward(torch.tensor(np.moveaxis(dy, 3, 1).astype(np.float64)))
        for got, wanted in [(ours.numpy(), expected), *((leaf.grad, peer.grad) for leaf, peer in leaves)]:
            wanted = np.moveaxis(wanted.detach().numpy(), 1, 3)
            assert got.shape == wanted.shape
            assert (np.abs(got - wanted) <= 64 * np.finfo(dtype).eps * np.abs(wanted).max()).all()

    device_of = get_device(device)
    a, b, peers = tensor(x, device, True), tensor(weight, device, True), (theirs(x), theirs(weight))
    cropped = functional.conv_transpose2d(*peers, stride=2, padding=1)[:, :, : size[0], : size[1]]
    compare(conv_transpose2d(a, b, size), cropped, [(a, peers[0]), (b, peers[1])])
    a, peer = tensor(x, device, True), theirs(x)
    expected = functional.interpolate(peer, size=size, mode="bilinear", align_corners=False)
    compare(resize_bilinear(a, size), expected, [(a, peer)])


def test_what_does_not_fit_is_refused():
    x, weight = tensor(np.zeros((1, 3, 4, 2)), "numpy"), tensor(np.zeros((2, 4, 4, 5)), "numpy")
    for size in ((6, 9), (4, 8), (7, 8)):
        with pytest.raises(ShapeError, match=r"cannot become a map of size .* 5\.\.6 x 7\.\.8"):
            conv_transpose2d(x, weight, size)
    for shape in ((3, 4, 4, 5), (2, 3, 3, 5), (2, 4, 4)):
        with pytest.raises(ShapeError, match=r"expected \(c, 4, 4, o\) with the 2 channels"):
            conv_transpose2d(x, tensor(np.zeros(shape), "numpy"), (6, 8))
    with pytest.raises(DTypeError, match="float32"):
        conv_transpose2d(x, tensor(np.zeros((2, 4, 4, 5), np.float32), "numpy"), (6, 8))
    with pytest.raises(ShapeError, match="there is no rung"):
        conv_transpose2d(x, weight, (6, 8), rung="fastest")


# Networks


@each_decoder
@each_network
def test_the_list_of_blocks_says_how_maps_grow(network, decoder):
    model = network(5, NARROW, "numpy", decoder=decoder)
    starts = [block for block in model.blocks if block.decoder and block.index == 1]
    assert [block.unpool for block in starts] == [decoder] * len(starts)
    assert not any(block.unpool for block in model.blocks if block not in starts)
    names = [name for name in model.named_parameters() if ".up." in name]
    stages = [block.stage for block in starts] if decoder == "deconv" else []
    assert names == [f"decoder.{s}.up.weight" for s in stages]
    for block in starts if stages else []:
        wide = block.in_channels
        weight = model.state_dict()[f"decoder.{block.stage}.up.weight"]
        np.testing.assert_array_equal(weight, np.moveaxis(bilinear_weight(wide), 3, 1))


@each_network
def test_every_decoder_starts_from_the_same_weights(network):
    states = [network(5, NARROW, "numpy", decoder=decoder, seed=3).state_dict() for decoder in DECODERS]
    for state in states[1:]:
        for name, array in states[0].items():
            np.testing.assert_array_equal(state[name], array, err_msg=name)
    assert states[0].keys() == states[1].keys() < states[2].keys()


def test_an_unknown_decoder_is_refused():
    with pytest.raises(ConfigError, match="decoder 'unet'; expected one of indices, bilinear, deconv"):
        SegNet(5, NARROW, "numpy", decoder="unet")
    with pytest.raises(ConfigError, match='decoder: expected "indices" or "bilinear" or "deconv"'):
        Config(decoder="unet")
    description = SegNet(5, NARROW, "numpy").describe()
    with pytest.raises(CheckpointError, match="decoder"):
        build({**description, "decoder": "unet"}, "numpy")
    del description["decoder"]  # a file of before there were others
    assert build(description, "numpy").decoder_kind == "indices"


@each_decoder
def test_only_indices_outlive_their_pools(decoder, monkeypatch):
    model = SegNet(5, NARROW, "numpy", decoder=decoder).eval()
    pools, alive = [], []

    def watched_pool(x):
        y, codes = max_pool(x)
        pools.append(weakref.ref(codes))
        return y, codes

    first = model.decoder[5][1].forward
    monkeypatch.setattr("segnet_scratch.segnet.max_pool", watched_pool)
    monkeypatch.setattr(
        model.decoder[5][1],
        "forward",
        lambda x: (alive.extend(codes for codes in pools[:-1] if codes() is not None), first(x))[1],
    )
    with no_grad():
        model(images())
    assert len(pools) == 5
    assert len(alive) == (4 if decoder == "indices" else 0)


# Files and runs


@each_decoder
@each_network
def test_a_saved_network_comes_back(network, decoder, tmp_path):
    model = network(5, NARROW, "numpy", decoder=decoder, dropout=True)
    one_pass(model)
    weights.save(tmp_path / "m.safetensors", model, {"classes": list("abcde")})
    loaded = load(tmp_path / "m.safetensors", "numpy")
    assert (type(loaded), loaded.training, loaded.decoder_kind) == (network, False, decoder)
    assert loaded.describe() == model.describe()
    assert loaded.metadata["classes"] == list("abcde")
    np.testing.assert_array_equal(loaded(images()).numpy(), model.eval()(images()).numpy())
    fits = decoder != "deconv"  # no weights of its own: such a network starts from one of indices, and the reverse
    other = network(5, NARROW, "numpy")
    if fits:
        weights.initialise(other, tmp_path / "m.safetensors")
    else:
        with pytest.raises(CheckpointError, match=r"not known: \d \(decoder\.1\.up\.weight"):
            weights.initialise(other, tmp_path / "m.safetensors")


def test_a_transposed_convolution_has_the_layout_of_pytorch_in_files(tmp_path):
    torch = pytest.importorskip("torch")
    import safetensors.torch

    model = SegNetBasic(5, NARROW, "numpy", decoder="deconv")
    weight = model.decoder[2]["up"].weight
    weight.data += np.random.default_rng(0).standard_normal(weight.shape).astype(np.float32)
    weights.save(tmp_path / "m.safetensors", model, {})
    to_pytorch(tmp_path / "m.safetensors", tmp_path / "t.safetensors")
    peer = torch.nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1, bias=False)
    state = safetensors.torch.load_file(tmp_path / "t.safetensors")
    peer.load_state_dict({"weight": state["decoder.2.up.weight"]})
    x = images(1, 5, 6)[..., :1].repeat(4, 3)
    with torch.no_grad():
        expected = np.moveaxis(peer(torch.tensor(np.moveaxis(x, 3, 1))).numpy(), 1, 3)
    np.testing.assert_allclose(model.decoder[2]["up"](tensor(x, "numpy"), (10, 12)).numpy(), expected, atol=1e-5)
    back = from_pytorch(tmp_path / "t.safetensors", tmp_path / "back.safetensors", {})
    assert back.decoder_kind == "deconv"
    np.testing.assert_array_equal(back.decoder[2]["up"].weight.numpy(), weight.numpy())
