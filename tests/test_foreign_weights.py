"""Checkpoints of public PyTorch SegNets come in with the same logits, and go back into the module that wrote them.

The modules have the names, the order and the habits of published ones, written anew from those: a flat one, its layers
attributes `conv11`, `bn11`, ... `conv11d`; one whose encoder starts from VGG16's features and whose decoder is of
transposed convolutions, which keeps that VGG16 in its state dict; one of lists. PyTorch on the CPU is the oracle.
"""

import hashlib
import io
import pickle
import re
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from support.commands import assert_error, plain, train_arguments

from segnet_scratch import SegNet, checkpoint, load
from segnet_scratch import weights as model_files
from segnet_scratch.config import PRETRAINED
from segnet_scratch.convert import from_pytorch, read_map, to_pytorch
from segnet_scratch.data.download import install
from segnet_scratch.errors import CheckpointError

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of these tests: pip install -e .[oracle]")
nn, functional = torch.nn, torch.nn.functional

STAGES = ((4, 4), (8, 8), (16, 16, 16), (32, 32, 32), (32, 32, 32))  # VGG16's at a sixteenth of its width
CLASSES = 5
RNG = np.random.default_rng(0)


class Flat(nn.Module):  # type: ignore[name-defined]
    """conv11, bn11, ... down to conv53, then conv53d, bn53d, ... up to conv11d, which has no norm."""

    def __init__(self, classes=CLASSES, floor=True):
        super().__init__()
        self.floor, before = floor, 3
        for s, outputs in enumerate(STAGES, start=1):
            for i, channels in enumerate(outputs, start=1):
                self.add(f"{s}{i}", before, channels)
                before = channels
        for s in range(5, 0, -1):
            for i in range(len(STAGES[s - 1]), 0, -1):
                below = STAGES[s - 2][-1] if s > 1 else classes
                channels = STAGES[s - 1][i - 1] if i > 1 else below
                self.add(f"{s}{i}d", before, channels, norm=(s, i) != (1, 1))
                before = channels

    def add(self, name, before, channels, norm=True):
        setattr(self, f"conv{name}", nn.Conv2d(before, channels, 3, padding=1))
        if norm:
            setattr(self, f"bn{name}", nn.BatchNorm2d(channels, momentum=0.1))

    def unit(self, name, x):
        return functional.relu(getattr(self, f"bn{name}")(getattr(self, f"conv{name}")(x)))

    def forward(self, x):
        pools = []
        for s, outputs in enumerate(STAGES, start=1):
            for i in range(1, len(outputs) + 1):
                x = self.unit(f"{s}{i}", x)
            size = x.shape[2:]
            x, places = functional.max_pool2d(x, 2, 2, ceil_mode=not self.floor, return_indices=True)
            pools.append((places, size))
        for s in range(5, 0, -1):
            places, size = pools.pop()
            x = functional.max_unpool2d(x, places, 2, 2, output_size=size)
            for i in range(len(STAGES[s - 1]), 0, -1):
                x = self.conv11d(x) if (s, i) == (1, 1) else self.unit(f"{s}{i}d", x)
        return x


class FromVgg16(nn.Module):  # type: ignore[name-defined]
    """nn.Sequential(convolution, norm) a unit, beside the VGG16 that the encoder was copied from; a turned decoder."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.vgg16 = nn.Module()
        layers, before = [], 3
        for outputs in STAGES:
            for channels in outputs:
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
                before = channels
            layers.append(nn.MaxPool2d(2))
        self.vgg16.features = nn.Sequential(*layers)
        self.vgg16.classifier = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 8))
        before = 3
        for s, outputs in enumerate(STAGES):
            for i, channels in enumerate(outputs):
                unit = nn.Sequential(nn.Conv2d(before, channels, 3, padding=1), nn.BatchNorm2d(channels))
                setattr(self, f"encoder_conv_{s}{i}", unit)
                before = channels
        for s in range(4, -1, -1):
            for i in range(len(STAGES[s]) - 1, -1, -1):
                channels = STAGES[s][i - 1] if i else (STAGES[s - 1][-1] if s else classes)
                layers = [nn.ConvTranspose2d(before, channels, 3, padding=1), nn.BatchNorm2d(channels)]
                setattr(self, f"decoder_convtr_{s}{i}", nn.Sequential(*layers[: 2 if s or i else 1]))
                before = channels

    def forward(self, x):
        pools = []
        for s, outputs in enumerate(STAGES):
            for i in range(len(outputs)):
                x = functional.relu(getattr(self, f"encoder_conv_{s}{i}")(x))
            size = x.shape[2:]
            x, places = functional.max_pool2d(x, 2, 2, return_indices=True)
            pools.append((places, size))
        for s in range(4, -1, -1):
            places, size = pools.pop()
            x = functional.max_unpool2d(x, places, 2, 2, output_size=size)
            for i in range(len(STAGES[s]) - 1, -1, -1):
                x = getattr(self, f"decoder_convtr_{s}{i}")(x)
                x = functional.relu(x) if s or i else x
        return x


class Basic(nn.Module):  # type: ignore[name-defined]
    """SegNet-Basic in lists: convolutions without bias, and all norms behind them."""

    def __init__(self, classes=CLASSES, wide=8):
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(3 if s == 0 else wide, wide, 7, padding=3, bias=False) for s in range(4))
        self.up = nn.ModuleList(nn.Conv2d(wide, wide, 7, padding=3, bias=False) for s in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(wide) for s in range(8))
        self.head = nn.Conv2d(wide, classes, 1)

    def forward(self, x):
        pools = []
        for s in range(4):
            x = functional.relu(self.norms[s](self.down[s](x)))
            size = x.shape[2:]
            x, places = functional.max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True)
            pools.append((places, size))
        for s in range(4):
            places, size = pools.pop()
            x = self.norms[4 + s](self.up[s](functional.max_unpool2d(x, places, 2, 2, output_size=size)))
        return self.head(x)


def lived_in(module, seed=1):
    """The module with norms as training leaves them: statistics, gains and shifts that are not those of a fresh one."""
    torch.manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for array, (low, high) in {
                part.running_mean: (-0.3, 0.3),
                part.running_var: (0.3, 2),
                part.weight.data: (0.7, 1.4),
                part.bias.data: (-0.2, 0.4),
            }.items():
                array.uniform_(low, high)
            part.num_batches_tracked.fill_(40)
        elif isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(part.weight)
            if part.bias is not None:
                nn.init.uniform_(part.bias, -0.5, 0.5)
    return module.eval()


def logits(module, images):
    with torch.no_grad():
        return module(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()


def assert_same_logits(ours, module, size):
    images = RNG.standard_normal((1, *size, 3)).astype(np.float32)
    expected, got = logits(module, images), ours(images).numpy()
    assert np.abs(expected).max() > 0.1
    assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()


SIZES = [(64, 96), (45, 61)]  # 32 divides the one; floor and ceil differ at the other
MODULES = {"flat": (Flat, "floor"), "flat, ceil": (lambda: Flat(floor=False), "ceil")}
MODULES |= {"from VGG16": (FromVgg16, "floor"), "basic": (Basic, "ceil")}


@pytest.mark.parametrize("name", MODULES)
def test_a_public_segnet_comes_in_and_goes_back(name, tmp_path):
    make, pooling = MODULES[name]
    theirs, ours, back = tmp_path / "theirs.pth", tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    module, lines = lived_in(make()), []
    torch.save(module.state_dict(), theirs)
    from_pytorch(theirs, ours, {}, pooling, report=lines.append)
    model = load(ours, "numpy")
    for size in SIZES:
        assert_same_logits(model, module, size)
    blocks = [f"{block.name} " for block in model.blocks] + ["classifier "]
    assert [line for line in lines if not line.startswith("left out")] == [
        line for block, line in zip(blocks, lines, strict=False) if line.startswith(block)
    ]
    # Trained on, then back: a fresh module takes it with every array, and computes what we do.
    for array in model.named_parameters().values():
        array.data[...] += RNG.normal(0, 0.01, array.shape)
    model_files.save(ours, model, {})
    count = to_pytorch(ours, back, like=theirs)
    state = {key: torch.from_numpy(array) for key, array in checkpoint.load_foreign(back)[0].items()}
    assert count == len(state) == len(module.state_dict())
    fresh = make().eval()
    fresh.load_state_dict(state, strict=True)
    assert_same_logits(model, fresh, (45, 61))


def test_an_eps_of_another_value_goes_both_ways(tmp_path):
    theirs, ours, back = tmp_path / "theirs.pth", tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    module = lived_in(Flat())
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 1e-3
    torch.save(module.state_dict(), theirs)
    from_pytorch(theirs, ours, {}, "floor", eps=1e-3)
    assert_same_logits(load(ours, "numpy"), module, (33, 40))
    to_pytorch(ours, back, like=theirs, eps=1e-3)
    got, expected = checkpoint.load_foreign(back)[0], checkpoint.load_foreign(theirs)[0]
    np.testing.assert_allclose(got["bn33d.running_var"], expected["bn33d.running_var"], rtol=1e-5)


def test_a_classifier_without_bias(tmp_path):
    theirs, ours, back = tmp_path / "theirs.pth", tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    module = lived_in(Basic())
    module.head.bias = None
    torch.save(module.state_dict(), theirs)
    from_pytorch(theirs, ours, {})
    assert_same_logits(load(ours, "numpy"), module, (40, 40))
    assert to_pytorch(ours, back, like=theirs) == len(module.state_dict())
    model = load(ours, "numpy")
    model.classifier.bias.data[...] = 1
    model_files.save(ours, model, {})
    with pytest.raises(CheckpointError, match=r"theirs\.pth: its network has no place for classifier\.bias"):
        to_pytorch(ours, back, like=theirs)


def test_a_safetensors_file_has_lost_the_order_and_a_map_brings_it_back(tmp_path):
    """safetensors sorts by name: conv11, conv11d, ...; the message shows both lists, and says what to write."""
    theirs, ours, again = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    module = lived_in(Flat())
    arrays = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    safetensors.numpy.save_file(arrays, theirs)
    with pytest.raises(CheckpointError, match=r"26, with 25 batch norms; 26 with 25 are expected") as raised:
        from_pytorch(theirs, ours, {}, "floor")
    lines = str(raised.value).splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["conv11", "4x3x3x3", "encoder.1.1.conv", "4x3x3x3"],
        ["conv11d", "5x4x3x3", "!=", "encoder.1.2.conv", "4x4x3x3"],
    ]
    assert "--map" in lines[-1]
    assert not ours.exists()
    units = [(f"{s}{i}", f"encoder.{s}.{i}") for s in range(1, 6) for i in range(1, len(STAGES[s - 1]) + 1)]
    decoder = [(s, i) for s in range(5, 0, -1) for i in range(len(STAGES[s - 1]), 0, -1)][:-1]
    units += [(f"{s}{i}d", f"decoder.{s}.{len(STAGES[s - 1]) + 1 - i}") for s, i in decoder]
    lines = [f"{kind}{a} = '{b}.{part}'" for a, b in units for kind, part in (("conv", "conv"), ("bn", "bn"))]
    (tmp_path / "names.toml").write_text("\n".join([*lines, "conv11d = 'classifier'"]))
    names = read_map(tmp_path / "names.toml")
    from_pytorch(theirs, ours, names, "floor")
    assert_same_logits(load(ours, "numpy"), module, (32, 64))
    assert to_pytorch(ours, again, theirs, names) == len(arrays)
    back = checkpoint.load_foreign(again)[0]
    assert back.keys() == arrays.keys()
    assert np.array_equal(back["conv32d.weight"], arrays["conv32d.weight"])
    assert not back["conv32d.bias"].any()
    assert back["bn11.num_batches_tracked"] == 40


def test_fewer_classes_go_back_and_another_network_does_not(tmp_path):
    theirs, ours, back = tmp_path / "theirs.pth", tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    torch.save(Flat(11).state_dict(), theirs)
    model_files.save(ours, SegNet(3, 1 / 16, "numpy"), {})
    to_pytorch(ours, back, like=theirs)
    assert checkpoint.load_foreign(back)[0]["conv11d.weight"].shape == (3, 4, 3, 3)
    model_files.save(ours, SegNet(3, 1 / 32, "numpy"), {})
    with pytest.raises(CheckpointError, match=r"conv11\.weight is 4x3x3x3, but 2x3x3x3 in .*ours"):
        to_pytorch(ours, back, like=theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "bn11d", nn.BatchNorm2d(CLASSES)), "26, with 26 batch norms"),
        (lambda m: delattr(m, "bn42"), "26, with 24 batch norms"),
        (lambda m: setattr(m, "conv42", nn.Conv2d(32, 32, 1)), r"!= encoder\.4\.2\.conv"),
    ],
)
def test_what_is_no_segnet_is_refused_with_both_lists(change, message, tmp_path):
    module = Flat()
    change(module)
    torch.save(module.state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(CheckpointError, match=message):
        from_pytorch(tmp_path / "theirs.pth", tmp_path / "ours.safetensors", {})


def test_the_commands(tmp_path, segnet):
    theirs, ours, back = tmp_path / "theirs.pth", tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    torch.save({"epoch": 3, "state_dict": nn.DataParallel(lived_in(FromVgg16())).state_dict()}, theirs)
    done = segnet("convert", theirs, ours, "--pooling", "floor")
    assert done.code == 0
    assert re.search(
        r"encoder\.1\.1 +<- module\.encoder_conv_00\.0 4x3x3x3, its bias folded, module\.encoder_conv", done.out
    )
    assert re.search(r"decoder\.2\.2 +<- module\.decoder_convtr_10\.0 8x4x3x3 turned, its bias folded", done.out)
    assert re.search(r"left out: 30 arrays \(module\.vgg16\.features\.0\.weight, ", done.out)
    assert segnet("convert", ours, back, "--like", theirs).code == 0
    state = {key: torch.from_numpy(array) for key, array in checkpoint.load_foreign(back)[0].items()}
    nn.DataParallel(FromVgg16()).load_state_dict(state, strict=True)
    (tmp_path / "m.toml").write_text('"a" = "b"')
    refused = segnet("convert", ours, back, "--to", "pytorch", "--map", tmp_path / "m.toml")
    assert refused.code == 2
    assert "give one with --like" in refused.err


# --- files of torch.save

TENSORS = {
    "float": torch.randn(3, 4, 5),
    "double": torch.randn(7, dtype=torch.float64),
    "half": torch.randn(5, 3).half(),
    "bfloat16": torch.randn(5, 3).bfloat16(),
    "transposed": torch.randn(4, 6, 2).permute(2, 0, 1),
    "every other": torch.arange(20.0)[3::2],
    "count": torch.tensor(17),
    "empty": torch.zeros(0, 3),
    "bool": torch.tensor([True, False]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "short": torch.arange(-2, 5, dtype=torch.int16),
    "parameter": nn.Parameter(torch.randn(2, 2)),
}
TENSORS["shared"] = TENSORS["float"][1]
FORMATS = {"zip": {}, "zip, protocol 4": {"pickle_protocol": 4}, "legacy": {"_use_new_zipfile_serialization": False}}


class OldParameter:
    """Pickled as PyTorch 0.1 did a parameter: the class, called without anything, and its tensor in the state."""

    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        return nn.Parameter, (), (self.data, None, True, False, None)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "wrap", [dict, lambda d: {"epoch": 3, "state_dict": d, "ema": d}, lambda d: {"net": d, "lr": 0.1}]
)
def test_every_tensor_of_a_state_dict_is_read(form, wrap, tmp_path):
    torch.save(wrap(TENSORS | {"old": OldParameter(TENSORS["float"])}), tmp_path / "x.pth", **FORMATS[form])
    got = checkpoint.load_foreign(tmp_path / "x.pth")[0]
    assert list(got) == [*TENSORS, "old"]
    for name, tensor in {**TENSORS, "old": TENSORS["float"]}.items():
        expected = tensor.detach()
        expected = (expected.float() if expected.dtype == torch.bfloat16 else expected).numpy()
        assert got[name].dtype == expected.dtype, name
        np.testing.assert_array_equal(got[name], expected, err_msg=name, strict=True)
    assert np.shares_memory(got["float"], got["shared"])


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path, how):
        self.path, self.how = str(path), how

    def __reduce__(self):
        return self.how(self.path)


WAYS = {
    "open": lambda path: (open, (path, "w")),
    "exec": lambda path: (exec, (f"open({path!r}, 'w')",)),
    "os.mknod": lambda path: (__import__("os").mknod, (path,)),
    "class with state": lambda path: (io.FileIO, (path, "w"), {"a": 1}),
}


@pytest.mark.parametrize("form", [*FORMATS, "pickle", "pickle 4"])
@pytest.mark.parametrize("how", WAYS)
def test_a_pickle_that_runs_code_is_refused_and_does_not(form, how, tmp_path):
    path, made = tmp_path / "evil.pth", tmp_path / "made"
    content = {"state_dict": {"w": torch.zeros(2) if form in FORMATS else 1}, "x": Evil(made, WAYS[how])}
    if form in FORMATS:
        torch.save(content, path, **FORMATS[form])
    else:
        path.write_bytes(pickle.dumps(content, protocol=4 if form.endswith("4") else 2))
    for read in (checkpoint.load_foreign, lambda p: from_pytorch(p, tmp_path / "out", {})):
        with pytest.raises(
            CheckpointError, match=r"evil\.pth: expected .*a pickle that wants [a-z_]+\.\w+, which no state"
        ):
            read(path)
    assert not made.exists()
    if form not in FORMATS:  # it would have
        pickle.loads(path.read_bytes())
        assert made.exists()


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_was_cut_off_or_damaged_is_refused(form, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(TENSORS, path, **FORMATS[form])
    content = path.read_bytes()
    for length in sorted({4, 20, *RNG.integers(4, len(content), 60), len(content) - 1}):
        path.write_bytes(content[:length])
        with pytest.raises(
            CheckpointError, match=r"x\.pth: expected a sound safetensors or PyTorch file, got: .*; get it anew"
        ):
            checkpoint.load_foreign(path)[0]
    for place in RNG.integers(4, len(content), 150):
        damaged = bytearray(content)
        damaged[place] ^= 1 << RNG.integers(8)
        path.write_bytes(damaged)
        try:  # a legacy file has no checksums; a damage that leaves it readable shows nowhere
            got = checkpoint.load_foreign(path)[0]
        except CheckpointError:
            continue
        assert sum(array.nbytes for array in got.values()) < 20 * len(content)


def handmade(tmp_path, size, stride, offset=0, count=4, dtype="FloatStorage", key="0"):
    """A .pth file whose one tensor is described as told, over a storage of 4 numbers."""

    class Named:
        def __init__(self, name):
            self.name = name

        def __reduce__(self):
            return self.name

    class Pickler(pickle._Pickler):
        def persistent_id(self, thing):
            return thing.told if isinstance(thing, Storage) else None

        def save(self, thing, save_persistent_id=True):
            if isinstance(thing, Named):
                return self.write(f"c{thing.name}\n".encode())
            return super().save(thing, save_persistent_id)

    class Storage:
        told = ("storage", Named(f"torch\n{dtype}"), key, "cpu", count)

    class Tensor:
        def __reduce__(self):
            return Rebuild, (Storage(), offset, size, stride, False, {})

    Rebuild = lambda: None  # noqa: E731
    stream = io.BytesIO()
    pickler = Pickler(stream, 2)
    pickler.dispatch = pickle._Pickler.dispatch | {
        type(Rebuild): lambda self, _: self.write(b"ctorch._utils\n_rebuild_tensor_v2\n")
    }
    pickler.dump({"w": Tensor()})
    with zipfile.ZipFile(tmp_path / "hand.pth", "w") as archive:
        archive.writestr("a/data.pkl", stream.getvalue())
        archive.writestr("a/data/0", np.arange(4, dtype="<f4").tobytes())
    return tmp_path / "hand.pth"


def test_a_tensor_that_would_reach_beyond_its_storage_is_refused(tmp_path):
    got = checkpoint.load_foreign(handmade(tmp_path, (2, 2), (1, 2)))[0]["w"]
    np.testing.assert_array_equal(got, [[0, 2], [1, 3]])
    for wrong, message in (
        ({"size": (5,), "stride": (1,)}, "larger than its storage of 4"),
        ({"size": (2,), "stride": (4,)}, "larger than its storage"),
        ({"size": (4,), "stride": (1,), "offset": 1}, "larger than its storage"),
        ({"size": (2,), "stride": (-1,), "offset": 3}, "no sizes"),
        ({"size": (1 << 40,), "stride": (0,)}, "larger than its storage"),
        ({"size": (1,), "stride": (1,), "offset": -1}, "no sizes"),
        ({"size": (1,), "stride": (1,), "count": 1 << 40}, "more than there are"),
        ({"size": (1,), "stride": (1,), "count": 5}, "cut off"),
        ({"size": (1,), "stride": (1,), "key": "1"}, "damaged"),
        ({"size": (1,), "stride": (1,), "dtype": "ComplexFloatStorage"}, r"wants torch\.ComplexFloatStorage"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load_foreign(handmade(tmp_path, **wrong))[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, r"holds several \(a, b\), of which none"),
        ({"epoch": 3}, "holds none"),
        ([torch.ones(1)], "holds none"),
        (nn.Linear(2, 2), r"wants torch\.nn\.modules\.linear\.Linear.*save the state dict alone"),
    ],
)
def test_what_holds_no_state_dict_says_so(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_foreign(tmp_path / "x.pth")[0]


# --- VGG16 by name


def vgg16(norms, head):
    """The state dict of VGG16 at a sixteenth of its width, its last layers under torchvision's names or timm's."""
    layers, before = [], 3
    for outputs in STAGES:
        for channels in outputs:
            layers += [
                nn.Conv2d(before, channels, 3, padding=1),
                *([nn.BatchNorm2d(channels)] if norms else []),
                nn.ReLU(),
            ]
            before = channels
        layers.append(nn.MaxPool2d(2))
    module = nn.Module()
    module.features = nn.Sequential(*layers)
    module.add_module(head, nn.Linear(32, 10))
    return lived_in(module)


@pytest.fixture
def served(server, monkeypatch, tmp_path):
    """Serves content as the weights of a name, in place of torchvision's; gives the place where they are kept."""

    def serve(name, content, **behaviour):
        file = f"{name}-{hashlib.sha256(content).hexdigest()[:8]}.pth"
        url = server.url(file, content=content, **behaviour)
        monkeypatch.setattr(install, "_WEIGHTS", url.removesuffix(file))
        monkeypatch.setitem(PRETRAINED, name, (file, len(content)))
        monkeypatch.setenv("SEGNET_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache" / "weights" / file

    return serve


SETTINGS = ["width=0.0625", "size=32", "batch=2", "steps=1", "workers=0", "lr=1e-30"]


@pytest.mark.parametrize(("name", "legacy"), [("vgg16", True), ("vgg16-bn", False)])
def test_vgg16_by_name_is_downloaded_once_and_begins_the_encoder(
    name, legacy, served, server, sample, tmp_path, segnet
):
    module, stream = vgg16(name.endswith("bn"), "classifier"), io.BytesIO()
    torch.save(module.state_dict(), stream, _use_new_zipfile_serialization=not legacy)
    kept = served(name, stream.getvalue(), cuts=[5000])
    for run in ("first", "second"):
        done = segnet(*train_arguments(sample, tmp_path / run, "--init", name, settings=SETTINGS))
        assert done.code == 0, done.err
        assert f"encoder from {name.upper()} ({kept})" in plain(done.out).replace("vgg16 ", "vgg16")
    assert [path for path, _ in server.requests] == [kept.name, kept.name]  # broken off once, and never again
    first = load(tmp_path / "first" / "last.safetensors", "numpy").state_dict()
    assert np.array_equal(first["encoder.1.1.conv.weight"], module.features[0].weight.detach().numpy())
    assert f'init = "{name}"' in (tmp_path / "first" / "config.toml").read_text()
    resumed = segnet(*train_arguments(sample, tmp_path / "first", "--init", name, "--resume", settings=SETTINGS))
    assert resumed.code == 0, resumed.err


def test_vgg16_that_cannot_be_downloaded_says_what_to_do(served, sample, tmp_path, segnet):
    kept = served("vgg16", b"x" * 1000, status=[404])
    arguments = train_arguments(sample, tmp_path / "run", "--init", "vgg16", settings=SETTINGS)
    failed = segnet(*arguments)
    assert_error(failed, 1, kept.name, "http://127.0.0.1", "HTTP 404", "--init FILE", f"put it there yourself: {kept}")
    other = served("vgg16", b"y" * 1000)
    kept.parent.mkdir(parents=True, exist_ok=True)
    other.write_bytes(b"z" * 1000)
    assert_error(segnet(*arguments), 1, other, "another file than expected", "move it away")


@pytest.mark.parametrize("norms", [False, True])
def test_vgg16_of_timm_by_path(norms, tmp_path):
    module = vgg16(norms, "head")
    torch.save(module.state_dict(), tmp_path / "vgg.pth")
    model = SegNet(3, 1 / 16, "numpy")
    assert model_files.initialise(model, tmp_path / "vgg.pth").startswith(f"encoder from VGG16{'-BN' * norms} (")
    got, expected = model.eval(), module.features[: 44 if norms else 31]
    seen, images = {}, RNG.standard_normal((1, 32, 32, 3)).astype(np.float32)
    got.forward(images, lambda layer, output: seen.setdefault(layer, output.numpy()))
    np.testing.assert_allclose(seen["encoder.5.3"], logits(expected, images), rtol=1e-3, atol=1e-4)
