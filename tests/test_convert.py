import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from segnet_scratch import SegNet, SegNetBasic, checkpoint, load
from segnet_scratch import weights as model_files
from segnet_scratch.convert import from_pytorch, read_map, to_pytorch
from segnet_scratch.errors import CheckpointError, ConfigError
from segnet_scratch.nn.modules import BatchNorm2d, ConvUnit
from segnet_scratch.segnet import VGG16_STAGES

DOCS = Path(__file__).parents[1] / "docs" / "how-to" / "pytorch.md"
IMAGES = np.random.default_rng(0).standard_normal((1, 45, 35, 3)).astype(np.float32)


def trained(cls=SegNet, classes=5, width=1 / 16):
    """A model whose running statistics are not those of a fresh one."""
    model = cls(classes, width, "numpy", seed=3)
    model(IMAGES)
    return model.eval()


@pytest.mark.parametrize("cls", [SegNet, SegNetBasic])
def test_there_and_back(tmp_path, cls):
    model = trained(cls)
    ours, theirs, again = (tmp_path / f"{name}.safetensors" for name in ("ours", "theirs", "again"))
    model_files.save(ours, model, {})
    norms = len(model.named_modules(BatchNorm2d))
    assert to_pytorch(ours, theirs) == len(model.state_dict()) + norms  # num_batches_tracked
    assert type(from_pytorch(theirs, again, {})) is cls
    assert np.array_equal(load(again, "numpy")(IMAGES).numpy(), model(IMAGES).numpy())


def test_other_names_and_a_bias_before_the_norm(tmp_path):
    model = trained()
    bias = np.linspace(-1, 1, 4, dtype=np.float32)
    state = model.state_dict()
    state["encoder.1.1.bn.running_mean"] = state["encoder.1.1.bn.running_mean"] + bias
    theirs = {name.replace("encoder.1.1.conv.", "down.first.convolution."): a for name, a in state.items()}
    theirs["down.first.convolution.bias"] = bias
    theirs["encoder.1.1.bn.num_batches_tracked"] = np.array(7, np.int64)
    safetensors.numpy.save_file(theirs, tmp_path / "theirs.safetensors")
    (tmp_path / "names.toml").write_text('"down.first.convolution" = "encoder.1.1.conv"\n')
    names = read_map(tmp_path / "names.toml")
    from_pytorch(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors", names)
    difference = load(tmp_path / "ours.safetensors", "numpy")(IMAGES).numpy() - model(IMAGES).numpy()
    assert np.abs(difference).max() < 1e-4
    to_pytorch(tmp_path / "ours.safetensors", tmp_path / "back.safetensors", tmp_path / "theirs.safetensors", names)
    assert "down.first.convolution.weight" in checkpoint.load_foreign(tmp_path / "back.safetensors")[0]


def state_file(path, model, **changes):
    """A state dict under our names, with some arrays changed or added (or, as None, left out)."""
    state = {**model.state_dict(), **changes}
    safetensors.numpy.save_file({name: a for name, a in state.items() if a is not None}, path)
    return path


def read_text_map(folder, text):
    (folder / "names.toml").write_text(text)
    return read_map(folder / "names.toml")


@pytest.mark.parametrize("text", ["", '"module" = ""', '"module.encoder" = "encoder"\n"module" = ""'])
def test_a_prefix_of_every_name(tmp_path, text):
    """DataParallel's is known; a map may take any away."""
    model = trained()
    wrapped = {f"module.{name}": array for name, array in model.state_dict().items()}
    safetensors.numpy.save_file(wrapped, tmp_path / "m.safetensors")
    names = read_text_map(tmp_path, text)
    from_pytorch(tmp_path / "m.safetensors", tmp_path / "ours.safetensors", names)
    assert np.array_equal(load(tmp_path / "ours.safetensors", "numpy")(IMAGES).numpy(), model(IMAGES).numpy())
    to_pytorch(tmp_path / "ours.safetensors", tmp_path / "back.safetensors", tmp_path / "m.safetensors", names)
    assert set(checkpoint.load_foreign(tmp_path / "back.safetensors")[0]) == set(wrapped)


def test_an_array_that_is_left_out(tmp_path):
    model, extra = trained(), {"auxiliary.head.weight": np.ones((2, 2), np.float32), "steps": np.array(3)}
    path = state_file(tmp_path / "theirs.safetensors", model, **extra)
    with pytest.raises(CheckpointError, match="not known: 2"):
        from_pytorch(path, tmp_path / "ours.safetensors", {})
    from_pytorch(path, tmp_path / "ours.safetensors", read_text_map(tmp_path, '"auxiliary" = false\nsteps = false'))
    assert np.array_equal(load(tmp_path / "ours.safetensors", "numpy")(IMAGES).numpy(), model(IMAGES).numpy())


FAULTS = (
    ("two arrays of one name", {"old.weight": np.ones(3, np.float32)}, '"old" = "classifier"', "classifier.weight"),
    ("a line that matches nothing", {}, '"encoder.9" = "encoder.1"', "nothing begins with 'encoder.9'"),
    ("a false line that matches nothing", {}, '"aux" = false', "nothing begins with 'aux'"),
    ("negative variance", {"encoder.1.1.bn.running_var": np.full(4, -1, np.float32)}, "", "no variance is negative"),
    ("NaN", {"encoder.2.1.conv.weight": np.full((8, 4, 3, 3), np.nan, np.float32)}, "", "2.1.conv.weight .* no finite"),
    ("infinity", {"classifier.bias": np.full(5, np.inf, np.float32)}, "", "classifier.bias .* no finite"),
    ("booleans", {"classifier.bias": np.ones(5, bool)}, "", "classifier.bias .* no finite numbers .bool."),
)


@pytest.mark.parametrize(("changes", "text", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_weights_and_maps_that_cannot_be_meant(tmp_path, changes, text, message):
    path = state_file(tmp_path / "theirs.safetensors", trained(), **changes)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        from_pytorch(path, tmp_path / "ours.safetensors", read_text_map(tmp_path, text))
    assert not (tmp_path / "ours.safetensors").exists()
    if not text:
        with pytest.raises(CheckpointError, match=message):
            model_files.initialise(SegNet(5, 1 / 16, "numpy"), path)


def test_another_eps_of_the_batch_norms(tmp_path):
    model = trained()
    path = state_file(tmp_path / "theirs.safetensors", model)
    from_pytorch(path, tmp_path / "ours.safetensors", {}, eps=1e-3)
    for unit in model.named_modules(ConvUnit).values():  # what a network of that eps computes
        variance = unit.bn.running_var.data
        unit.bn.weight.data[...] *= np.sqrt((variance + 1e-5) / (variance + 1e-3))
    expected = model(IMAGES).numpy()
    got = load(tmp_path / "ours.safetensors", "numpy")(IMAGES).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    zero = {"encoder.1.1.bn.running_var": np.zeros(4, np.float32)}
    path = state_file(tmp_path / "theirs.safetensors", model, **zero)
    with pytest.raises(CheckpointError, match=r"encoder\.1\.1\.bn\.running_var: variances below"):
        from_pytorch(path, tmp_path / "ours.safetensors", {}, eps=1e-6)


def test_class_names_size_and_pooling_come_back(tmp_path):
    ours, theirs, again = (tmp_path / f"{name}.safetensors" for name in ("ours", "theirs", "again"))
    model = SegNet(3, 1 / 16, "numpy", pooling="floor")
    model_files.save(ours, model, {"classes": ["road", "sky", "tree"], "size": [96, 128]})
    to_pytorch(ours, theirs)
    from_pytorch(theirs, again, {})
    back = load(again, "numpy")
    assert (back.metadata["classes"], back.metadata["size"], back.pooling) == (
        ["road", "sky", "tree"],
        [96, 128],
        "floor",
    )
    from_pytorch(theirs, again, {}, "ceil", classes=["a", "b", "c"], size=(64, 64))
    assert (load(again, "numpy").metadata["classes"], load(again, "numpy").pooling) == (["a", "b", "c"], "ceil")
    with pytest.raises(ConfigError, match="2 class names for the 3 classes"):
        from_pytorch(theirs, again, {}, classes=["a", "b"])
    with pytest.raises(CheckpointError, match="pools odd maps in 'floor' mode, this one in 'ceil' mode"):
        model_files.initialise(SegNet(3, 1 / 16, "numpy"), ours)


@pytest.mark.parametrize("text", ["a = 3", "a = [", '"a" = "x"\n"b" = "x"'])
def test_maps_that_are_none(tmp_path, text):
    (tmp_path / "names.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"names\.toml"):
        read_map(tmp_path / "names.toml")


def test_the_command(segnet, tmp_path):
    model_files.save(tmp_path / "ours.safetensors", trained(), {})
    done = segnet("convert", tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors", "--to", "pytorch")
    assert (done.code, "arrays" in done.out) == (0, True)


def test_the_module_in_the_documentation_loads_our_weights(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle of this test: pip install -e .[oracle]")
    model = trained(classes=21)
    model_files.save(tmp_path / "ours.safetensors", model, {})
    to_pytorch(tmp_path / "ours.safetensors", tmp_path / "out.safetensors")
    code = re.search(r"```python\n(import torch\.nn.*?)```", DOCS.read_text(), re.DOTALL).group(1)
    code = code.replace('"out.safetensors"', repr(str(tmp_path / "out.safetensors")))
    narrow = "((4, 4), (8, 8), (16,) * 3, (32,) * 3, (32,) * 3)"
    space = {}
    exec(code.replace("model = SegNet(21)", f"model = SegNet(21, {narrow})"), space)
    with torch.no_grad():
        theirs = space["model"].eval()(torch.from_numpy(IMAGES).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    ours = model(IMAGES).numpy()
    assert np.abs(theirs - ours).max() <= 1e-4 * np.abs(ours).max()


def vgg16_arrays(norms):
    rng = np.random.default_rng(5)
    arrays, place, channels = {}, 0, 3
    for stage in VGG16_STAGES:
        for out in stage:
            scale = (2 / (9 * channels)) ** 0.5
            arrays[f"features.{place}.weight"] = (scale * rng.standard_normal((out, channels, 3, 3))).astype(np.float32)
            arrays[f"features.{place}.bias"] = (0.1 * rng.standard_normal(out)).astype(np.float32)
            if norms:
                parts = {"weight": (0.5, 1.5), "bias": (-1, 1), "running_mean": (-1, 1), "running_var": (0.5, 2)}
                for part, (low, high) in parts.items():
                    arrays[f"features.{place + 1}.{part}"] = rng.uniform(low, high, out).astype(np.float32)
                arrays[f"features.{place + 1}.num_batches_tracked"] = np.array(3, np.int64)
            place, channels = place + (3 if norms else 2), out
        place += 1
    return arrays


@pytest.mark.parametrize("norms", [False, True], ids=["VGG16", "VGG16-BN"])
def test_vgg16_through_init_computes_what_vgg16_does(tmp_path, norms):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    arrays = vgg16_arrays(norms)
    safetensors.numpy.save_file(arrays, tmp_path / "vgg.safetensors")
    model = SegNet(3, 1.0, "numpy").eval()
    fresh = model.state_dict()
    line = model_files.initialise(model, tmp_path / "vgg.safetensors")
    assert line.startswith(f"encoder from VGG16{'-BN' if norms else ''} (")
    images = np.random.default_rng(0).standard_normal((1, 32, 32, 3)).astype(np.float32)
    seen = {}
    model.forward(images, lambda layer, output: seen.setdefault(layer, output.numpy()))
    with torch.no_grad():
        x, place = torch.from_numpy(images).double().permute(0, 3, 1, 2), 0
        t = {name: torch.from_numpy(array).double() for name, array in arrays.items()}
        for stage in VGG16_STAGES:
            for _ in stage:
                x = functional.conv2d(x, t[f"features.{place}.weight"], t[f"features.{place}.bias"], padding=1)
                if norms:
                    parts = (t[f"features.{place + 1}.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
                    x = functional.batch_norm(x, *parts)
                x, place = functional.relu(x), place + (3 if norms else 2)
            x, place = functional.max_pool2d(x, 2), place + 1
    expected = x.permute(0, 2, 3, 1).numpy()
    # A variance of 1 in place of 1 - eps would be off by 13 x 5e-6.
    assert np.abs(seen["encoder.5.3"] - expected).max() < 1e-5 * np.abs(expected).max()
    for name, array in model.state_dict().items():
        assert name.startswith("encoder.") or np.array_equal(array, fresh[name]), name


def test_vgg16_with_norms_that_lacks_arrays_is_named(tmp_path):
    arrays = vgg16_arrays(norms=True)
    del arrays["features.41.running_var"]
    safetensors.numpy.save_file(arrays, tmp_path / "vgg.safetensors")
    with pytest.raises(CheckpointError, match=r"not VGG16-BN's convolutions: missing: 1 \(features\.41\.running_var\)"):
        model_files.initialise(SegNet(3, 1.0, "numpy"), tmp_path / "vgg.safetensors")
