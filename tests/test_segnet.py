"""The networks as published: blocks, names and shapes, loading, modes, VGG16's weights, equal devices."""

import numpy as np
import pytest
from support import raises, real

from segnet_scratch import SegNet, SegNetBasic, tensor, weights
from segnet_scratch.errors import CheckpointError, DeviceError, DTypeError, ShapeError
from segnet_scratch.nn.functions import cross_entropy
from segnet_scratch.nn.modules import Module
from segnet_scratch.segnet import build, segnet_basic_blocks, segnet_blocks

NARROW = 1 / 16

# Channels of the convolutions as the paper's figure 2 has them, in order of execution, with the stage of each.
ENCODER = [(1, 64), (1, 64), (2, 128), (2, 128), *[(3, 256)] * 3, *[(4, 512)] * 3, *[(5, 512)] * 3]
DECODER = [
    *[(5, 512)] * 3,
    *[(4, 512), (4, 512), (4, 256)],
    *[(3, 256), (3, 256), (3, 128)],
    *[(2, 128), (2, 64)],
    (1, 64),
]
FEATURES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # positions of the convolutions in torchvision's VGG16


def images(n=2, height=32, width=32, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((n, height, width, 3)).astype(dtype)


def labels(n=2, height=32, width=32, classes=21, seed=1):
    labels = np.random.default_rng(seed).integers(0, classes, (n, height, width)).astype(np.uint8)
    labels[:, :3] = 255
    return labels


def narrow(cls=SegNet, classes=5, **options):
    return cls(classes, NARROW, options.pop("device", "numpy"), **options)


def snapshot(model):
    return {name: array.copy() for name, array in model.state_dict().items()}


def assert_same(state, other):
    assert state.keys() == other.keys()
    for name in state:
        np.testing.assert_array_equal(state[name], other[name], err_msg=name)


# The networks


def test_segnet_has_the_blocks_of_the_paper():
    blocks = segnet_blocks(1.0, dropout=False)
    encoder, decoder = [b for b in blocks if not b.decoder], [b for b in blocks if b.decoder]
    assert blocks == encoder + decoder
    assert [(b.stage, b.out_channels) for b in encoder] == ENCODER
    assert [(b.stage, b.out_channels) for b in decoder] == DECODER
    assert [b.in_channels for b in blocks] == [3] + [b.out_channels for b in blocks[:-1]]
    assert all(b.kernel == 3 and b.relu and not b.dropout for b in blocks)
    # A pool ends each encoder stage, an unpool begins each decoder stage, nowhere else.
    assert [(b.stage, b.index) for b in blocks if b.pool] == [(1, 2), (2, 2), (3, 3), (4, 3), (5, 3)]
    assert [(b.stage, b.index) for b in blocks if b.unpool] == [(5, 1), (4, 1), (3, 1), (2, 1), (1, 1)]
    assert not any(b.pool for b in decoder)
    assert not any(b.unpool for b in encoder)


def test_segnet_basic_has_the_blocks_of_the_paper():
    blocks = segnet_basic_blocks(1.0, dropout=False)
    assert [(b.stage, b.decoder) for b in blocks] == [(s, False) for s in (1, 2, 3, 4)] + [
        (s, True) for s in (4, 3, 2, 1)
    ]
    assert all(b.kernel == 7 and b.out_channels == 64 for b in blocks)
    assert [b.in_channels for b in blocks] == [3] + [64] * 7
    assert all(b.relu == (not b.decoder) and b.pool == (not b.decoder) and bool(b.unpool) == b.decoder for b in blocks)


@pytest.mark.parametrize(("cls", "millions"), [(SegNet, 29.45), (SegNetBasic, 1.42)])
def test_parameter_counts_are_those_published(cls, millions):
    model = cls(classes=21, device="numpy")
    count = sum(int(np.prod(p.shape)) for p in model.parameters())
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize("cls", [SegNet, SegNetBasic])
def test_state_dict_has_the_names_and_shapes_of_checkpoints(cls):
    k = 3 if cls is SegNet else 7
    if cls is SegNet:
        halves = {"encoder": [(s, c // 16) for s, c in ENCODER], "decoder": [(s, c // 16) for s, c in DECODER]}
    else:
        halves = {"encoder": [(s, 4) for s in (1, 2, 3, 4)], "decoder": [(s, 4) for s in (4, 3, 2, 1)]}
    expected, channels = {}, 3
    for half, convolutions in halves.items():
        seen = []
        for stage, out in convolutions:
            seen.append(stage)
            prefix = f"{half}.{stage}.{seen.count(stage)}"
            expected[f"{prefix}.conv.weight"] = (out, channels, k, k)
            expected |= {f"{prefix}.bn.{part}": (out,) for part in ("weight", "bias", "running_mean", "running_var")}
            channels = out
    size = 3 if cls is SegNet else 1
    expected |= {"classifier.weight": (5, channels, size, size), "classifier.bias": (5,)}
    state = narrow(cls).state_dict()
    assert {name: array.shape for name, array in state.items()} == expected
    assert all(a.dtype == np.float32 and a.flags.c_contiguous for a in state.values())


def test_weights_in_files_are_out_in_height_width():
    model = narrow()
    weight = model.encoder[2][1].conv.weight.numpy()  # (out, height, width, in) in memory
    stored = model.state_dict()["encoder.2.1.conv.weight"]
    assert weight[3, 0, 2, 1] == stored[3, 1, 0, 2]
    np.testing.assert_array_equal(weight.transpose(0, 3, 1, 2), stored)


def test_state_dict_is_a_copy():
    model = narrow()
    before = snapshot(model)
    for array in model.state_dict().values():
        array.fill(7)
    assert_same(before, model.state_dict())


def test_initialisation_is_he_normal_and_seeded():
    a, b, c = (SegNet(5, 0.5, "numpy", seed=seed) for seed in (0, 0, 1))
    assert_same(a.state_dict(), b.state_dict())
    assert not np.array_equal(a.encoder[3][2].conv.weight.numpy(), c.encoder[3][2].conv.weight.numpy())
    weight = a.encoder[3][2].conv.weight.numpy()  # 128 x 9 x 128: the deviation is known to 0.2 %
    assert weight.std() == pytest.approx(np.sqrt(2 / (9 * 128)), rel=0.02)
    state = a.state_dict()
    assert all((array == (1 if name.endswith(("bn.weight", "var")) else 0)).all()
               for name, array in state.items() if ".bn." in name)  # fmt: skip


@pytest.mark.parametrize("width", [1 / 16, 0.3, 0.001])
def test_width_scales_every_layer(width):
    model = SegNet(4, width, "numpy")
    shapes = [b.out_channels for b in model.blocks]
    assert shapes == [max(1, round(c * width)) for _, c in ENCODER + DECODER]
    assert model(images(1)).shape == (1, 32, 32, 4)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"classes": 0}, "0 classes"),
        ({"classes": 256}, "void"),
        ({"width": 0}, "width 0"),
        ({"width": -1.0}, "width -1"),
        ({"width": float("nan")}, "width nan"),
    ],
)
def test_an_impossible_network_is_refused(options, part):
    with pytest.raises(ShapeError, match=part):
        SegNet(device="numpy", **options)


# Input


@pytest.mark.parametrize("cls", [SegNet, SegNetBasic])
@pytest.mark.parametrize(
    "size", [(32, 32), (33, 47), (63, 65), (45, 100)], ids=["smallest", "odd", "one beside 64", "odd at some stages"]
)
def test_logits_have_the_size_of_the_images(cls, size):
    model = narrow(cls)
    logits = model(images(2, *size))
    assert logits.shape == (2, *size, 5)
    assert logits.dtype == np.float32
    assert np.isfinite(logits.numpy()).all()
    assert model.eval()(images(1, *size)).shape == (1, *size, 5)


def test_input_may_be_a_tensor_or_a_view():
    model = narrow().eval()
    x = images(2, 33, 40)
    expected = model(x).numpy()
    np.testing.assert_array_equal(model(tensor(x, "numpy")).numpy(), expected)
    view = np.ascontiguousarray(x[:, ::-1])[:, ::-1]
    assert not view.flags.c_contiguous
    np.testing.assert_array_equal(model(view).numpy(), expected)


def test_the_images_are_left_as_they_are():
    x = images()
    before = x.copy()
    model = narrow()
    cross_entropy(model(x), labels(classes=5)).backward()
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize(
    ("wrong", "error", "parts"),
    [
        (images().transpose(0, 3, 1, 2), ShapeError, ["(2, 3, 32, 32)", "(n, h, w, 3)", "channels last"]),
        (images()[0], ShapeError, ["(32, 32, 3)", "(n, h, w, 3)"]),
        (images()[..., :1], ShapeError, ["(2, 32, 32, 1)"]),
        (np.zeros((1, 32, 32, 3), np.uint8), DTypeError, ["uint8", "float32", "normalise"]),
        (images(dtype=np.float64), DTypeError, ["float64", "float32"]),
    ],
    ids=["channels first", "no batch", "grey", "bytes", "double"],
)
def test_wrong_input_is_refused(wrong, error, parts):
    with raises(error, "SegNet", *parts):
        narrow()(wrong)


def test_a_tensor_of_another_device_is_refused():
    with pytest.raises(DeviceError, match="host"):
        narrow()(tensor(images(), "host"))


# Loading


def wrong_states():
    yield "missing", lambda s: s.pop("decoder.1.1.bn.bias"), ["missing: 1 (decoder.1.1.bn.bias)"]
    yield "unknown", lambda s: s.update(extra=np.zeros(1, np.float32)), ["not known: 1 (extra)"]
    yield (
        "shape",
        lambda s: s.update({"decoder.1.1.bn.bias": np.zeros(5, np.float32)}),
        ["decoder.1.1.bn.bias", "(5,)", "(4,)"],
    )
    yield (
        "kernel",
        lambda s: s.update({"encoder.1.1.conv.weight": np.zeros((4, 3, 5, 5), np.float32)}),
        ["encoder.1.1.conv.weight", "(4, 3, 5, 5)", "(4, 3, 3, 3)"],
    )
    yield (
        "classes",
        lambda s: s.update(SegNet(11, NARROW, "numpy").state_dict()),
        ["11 classes", "this model has 5", "classes=11"],
    )
    yield (
        "classifier of another kernel",
        lambda s: s.update({"classifier.weight": np.zeros((5, 4, 1, 1), np.float32)}),
        ["classifier.weight", "(5, 4, 1, 1)", "(5, 4, 3, 3)"],
    )


@pytest.mark.parametrize(("change", "parts"), [c[1:] for c in wrong_states()], ids=[c[0] for c in wrong_states()])
def test_a_wrong_state_is_refused_and_changes_nothing(change, parts):
    model = narrow()
    before = snapshot(model)
    state = {name: array + 1 for name, array in narrow(seed=9).state_dict().items()}
    change(state)
    with raises(CheckpointError, *parts):
        model.load_state_dict(state)
    assert_same(before, model.state_dict())


def test_a_classifier_that_differs_in_its_kernel_is_not_blamed_on_the_classes():
    state = narrow().state_dict() | {"classifier.weight": np.zeros((5, 4, 1, 1), np.float32)}
    with pytest.raises(CheckpointError) as raised:
        narrow().load_state_dict(state)
    assert "classes" not in str(raised.value)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    path, model = tmp_path / "m.safetensors", narrow()
    weights.save(path, model, {})
    before = path.read_bytes()
    model.decoder[3][1].bn.running_var.data[0] = np.nan
    with pytest.raises(CheckpointError, match=r"m\.safetensors.*running_var"):
        weights.save(path, model, {})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "description",
    [{}, {"architecture": "unet", "classes": 2, "width": 1.0, "dropout": False}, {"architecture": "segnet"}],
)
def test_an_unknown_description_is_refused(description):
    with pytest.raises(CheckpointError, match="segnet or segnet-basic"):
        build(description, "numpy")


def test_a_checkpoint_of_another_network_names_the_file(tmp_path):
    weights.save(tmp_path / "m.safetensors", narrow(SegNetBasic), {})
    with pytest.raises(CheckpointError, match=r"m\.safetensors.*not those of this SegNet"):
        weights.initialise(narrow(), tmp_path / "m.safetensors")


# Modes and dropout


def test_training_moves_the_running_statistics_and_evaluation_does_not():
    model = narrow()
    before = snapshot(model)
    model.eval()(images())
    assert_same(before, model.state_dict())
    model.train()(images())
    after = model.state_dict()
    for name in before:
        assert np.array_equal(before[name], after[name]) == ("running" not in name), name


def test_evaluation_treats_each_image_by_itself():
    model = narrow()
    model(images(4))
    a, b = images(1, seed=5), images(1, seed=6)
    together = model.eval()(np.concatenate([a, b])).numpy()
    np.testing.assert_allclose(together[:1], model(a).numpy(), rtol=1e-4, atol=1e-4)
    model.train()
    assert np.abs(model(np.concatenate([a, b])).numpy()[:1] - model(a).numpy()).max() > 1e-2


def test_the_mode_reaches_every_module():
    model = narrow(dropout=True)
    modules = [model, *model.named_modules(Module).values()]
    assert {model.classifier, *model.dropouts.values(), model.decoder[1][1].bn} <= set(modules)
    assert all(module.training for module in modules)
    assert model.eval() is model
    assert not any(module.training for module in modules)
    assert model.train() is model
    assert all(module.training for module in modules)


def test_zero_grad_forgets_all_gradients():
    model = narrow(SegNetBasic)
    cross_entropy(model(images()), labels(classes=5)).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_bayesian_segnet_drops_after_its_deepest_stages():
    blocks = segnet_blocks(1.0, dropout=True)
    assert [b.name for b in blocks if b.dropout] == [
        *("encoder.3.3", "encoder.4.3", "encoder.5.3"),
        *("decoder.5.3", "decoder.4.3", "decoder.3.3"),
    ]
    assert [b.name for b in segnet_basic_blocks(1.0, dropout=True) if b.dropout] == [
        *("encoder.3.1", "encoder.4.1"),
        *("decoder.4.1", "decoder.3.1"),
    ]


@pytest.mark.parametrize("cls", [SegNet, SegNetBasic])
def test_dropout_depends_on_seed_and_step_alone(cls):
    model, x = narrow(cls, dropout=True), images()

    def logits(seed, step):
        model.set_random_state(seed, step)
        return model(x).numpy()

    first = logits(1, 0)
    for other in (logits(1, 1), logits(2, 0), logits(1, 2**31)):
        assert np.abs(other - first).max() > 1e-3
    np.testing.assert_array_equal(logits(1, 0), first)
    np.testing.assert_array_equal(model(x).numpy(), first)  # the state stays until it is set
    again = narrow(cls, dropout=True)
    again.set_random_state(1, 0)
    np.testing.assert_array_equal(again(x).numpy(), first)


def test_dropout_is_off_in_evaluation():
    model, plain = narrow(dropout=True), narrow()
    assert_same(model.state_dict(), plain.state_dict())  # dropout has no weights
    for step in (0, 1):
        model.set_random_state(0, step)
        np.testing.assert_array_equal(model.eval()(images()).numpy(), plain.eval()(images()).numpy())


def test_every_dropout_layer_and_sample_has_a_mask_of_its_own():
    model = narrow(dropout=True)
    x = tensor(np.ones((2, 4, 4, 8), np.float32), "numpy")
    masks = [layer(x).numpy()[sample] for layer in model.dropouts.values() for sample in (0, 1)]
    assert len({mask.tobytes() for mask in masks}) == len(masks) == 12


# VGG16


@pytest.fixture(scope="module")
def vgg16():
    """The file with the weights of VGG16."""
    return real("weights", "vgg16_imagenet_features_fp16.safetensors")


def small_vgg16(width=1.0):
    """Weights of VGG16's names and channels, zeros; float16, as files have them."""
    channels, found = 3, {}
    for (_, out), index in zip(ENCODER, FEATURES, strict=True):
        out = round(out * width)
        found[f"features.{index}.weight"] = np.zeros((out, channels, 3, 3), np.float16)
        found[f"features.{index}.bias"] = np.zeros(out, np.float16)
        channels = out
    return found


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda w: w.pop("features.28.bias"), ["missing: 1 (features.28.bias)", "torchvision"]),
        (lambda w: w.clear(), ["missing: 26"]),
        (lambda w: w.update({"features.12.weight": np.zeros((4, 4, 3, 3))}), ["features.12", "encoder.3.2"]),
        (lambda w: w.update({"features.12.bias": np.zeros(1)}), ["features.12", "(1,)"]),
        (lambda w: w.update(small_vgg16(1.0)), ["features.0", "width 0.0625", "width = 1.0"]),
    ],
    ids=["no last bias", "another file", "weight of another shape", "bias of another shape", "narrow model"],
)
def test_weights_that_are_not_vgg16_are_refused_and_change_nothing(change, parts):
    model = narrow()
    before = snapshot(model)
    state = {name: array + 1 for name, array in small_vgg16(NARROW).items()}
    change(state)
    with raises(CheckpointError, *parts):
        model.load_vgg16(state)
    assert_same(before, model.state_dict())


def test_vgg16_fits_segnet_alone(vgg16):
    assert "VGG16" in weights.initialise(SegNet(21, 1.0, "numpy"), vgg16)
    with pytest.raises(CheckpointError, match=r"vgg16.*width 0\.5.*width = 1\.0"):
        weights.initialise(SegNet(21, 0.5, "numpy"), vgg16)
    with pytest.raises(CheckpointError, match=r"vgg16.*model = segnet only"):
        weights.initialise(SegNetBasic(21, 1.0, "numpy"), vgg16)


# Devices


@pytest.mark.parametrize("cls", [SegNet, SegNetBasic])
def test_numpy_and_host_give_the_same_gradients(cls):
    """With dropout; without it both are held to PyTorch (test_torch_parity.py)."""
    # In float64: in float32 an argmax that rounding flips moves a whole gradient to its neighbour.
    x, y = images(2, 33, 47, dtype=np.float64), labels(2, 33, 47, classes=5)
    models = [narrow(cls, device=device, dtype=np.float64, dropout=True) for device in ("numpy", "host")]
    losses = []
    for model in models:
        model.set_random_state(3, 4)
        loss = cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    a, b = (model.named_parameters() for model in models)
    for name in a:
        expected = a[name].grad
        np.testing.assert_allclose(b[name].grad, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max(), err_msg=name)
    for name, value in models[0].named_buffers().items():
        np.testing.assert_allclose(models[1].named_buffers()[name].data, value.data, rtol=1e-9, atol=1e-12)
