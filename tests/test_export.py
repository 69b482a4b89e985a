"""segnet export: onnxruntime computes from the file what the NumPy device does, or no file is written."""

import json
import re
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from PIL import Image
from support import ROOT
from support.commands import assert_error

from segnet_scratch import SegNet, SegNetBasic, __version__, weights
from segnet_scratch import export as exporting
from segnet_scratch.data import normalise, resize_image
from segnet_scratch.errors import SegnetError
from segnet_scratch.export import export
from segnet_scratch.nn.autograd import no_grad
from segnet_scratch.nn.modules import ConvUnit

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'segnet_scratch[onnx]'")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'segnet_scratch[onnx]'")

SIZES = [(32, 32), (33, 32), (32, 33), (37, 53), (41, 64), (45, 35), (47, 63), (48, 40), (63, 33), (64, 95)]


def network(cls=SegNet, dtype=np.float32, seed=0, **options):
    """A narrow network whose encoder adds and subtracts whole numbers: many ties, and rounding decides no pool.

    The decoder's numbers are of any kind, and so are the statistics of its batch norms.
    """
    model = cls(5, 1 / 16, "numpy", dtype=dtype, seed=seed, **options).eval()
    rng = np.random.default_rng(seed)
    for name, unit in model.named_modules(ConvUnit).items():
        shape = unit.bn.weight.shape
        values = (rng.uniform(0.5, 1.5, shape), *rng.standard_normal((2, *shape)) / 4, rng.uniform(0.5, 2, shape))
        if name.startswith("encoder"):
            o, k, _, c = unit.conv.weight.shape
            weight = np.zeros((o, k, k, c))
            weight[np.arange(o), k // 2, k // 2, np.arange(o) % c] = 1
            for row in weight:
                row[tuple(rng.integers(0, row.shape))] += rng.choice([-1, 1])
            unit.conv.weight.data[...] = weight
            values = np.ones(shape), rng.integers(-1, 2, shape), np.zeros(shape), np.full(shape, 1 - 1e-5)
        bn = unit.bn.weight, unit.bn.bias, unit.bn.running_mean, unit.bn.running_var
        for target, array in zip(bn, values, strict=True):
            target.data[...] = array
    model.metadata = {"classes": list("abcde"), "size": [48, 64]}
    return model


def integers(n, size, seed=1):
    return np.random.default_rng(seed).integers(-3, 4, (n, *size, 3)).astype(np.float32)


def own_logits(model, images):
    with no_grad():
        return model(images.astype(model.dtype)).numpy().transpose(0, 3, 1, 2)


def session(path):
    return runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(opened, images):
    opened = opened if isinstance(opened, runtime.InferenceSession) else session(opened)
    return opened.run(None, {"image": images.transpose(0, 3, 1, 2)})[0]


@pytest.mark.parametrize(
    ("cls", "decoder", "pooling"),
    [
        *product([SegNet], ["indices", "bilinear", "deconv"], ["ceil", "floor"]),
        *zip([SegNetBasic] * 3, ["indices", "bilinear", "deconv"], ["ceil", "floor", "ceil"], strict=True),
    ],
)
def test_onnxruntime_errs_as_little_as_the_numpy_device_at_every_size(tmp_path, cls, decoder, pooling):
    options = {"decoder": decoder, "pooling": pooling, "dropout": decoder == "indices"}
    model, exact = network(cls, **options), network(cls, np.float64, **options)
    files = {}
    for choices in [{}, {"unpool": "codes"} if decoder == "indices" else {"keep_batch_norm": True}]:
        export(model, tmp_path / "a.onnx", **choices)
        files[str(choices)] = session(tmp_path / "a.onnx")
    for n, size in enumerate(SIZES):
        images = integers(1 + n % 2, size)
        expected = own_logits(exact, images)
        bound = 4 * np.abs(own_logits(model, images) - expected).max()
        assert 0 < bound < 1e-4 * np.abs(expected).max()
        second, first = np.sort(expected, axis=1)[:, -2:].swapaxes(0, 1)
        for name, opened in files.items():
            found = run(opened, images)
            assert found.shape == expected.shape
            assert np.abs(found - expected).max() <= bound, (name, size)
            same = found.argmax(axis=1) == expected.argmax(axis=1)
            assert (same | (first - second <= 2 * bound)).all()


def test_indices_and_codes_are_two_ways_to_the_same_bits(tmp_path):
    model = network()
    export(model, tmp_path / "a.onnx")
    export(model, tmp_path / "b.onnx", unpool="codes")
    images = integers(2, (45, 70))
    np.testing.assert_array_equal(run(tmp_path / "a.onnx", images), run(tmp_path / "b.onnx", images))
    kinds = [[node.op_type for node in onnx.load(tmp_path / name).graph.node] for name in ("a.onnx", "b.onnx")]
    assert [kind.count("MaxUnpool") for kind in kinds] == [5, 0]
    assert [kind.count("MaxPool") for kind in kinds] == [5, 0]
    assert "BatchNormalization" not in kinds[0]


def test_what_goes_in_and_comes_out(tmp_path):
    model = network(decoder="bilinear")  # nothing jumps where rounding differs
    pictures = np.random.default_rng(2).integers(0, 256, (2, 37, 41, 3), np.uint8)
    expected = own_logits(model, np.stack([normalise(picture) for picture in pictures]))
    for kind, images in (("float", pictures / np.float32(255)), ("uint8", pictures)):
        export(model, tmp_path / "a.onnx", kind)
        np.testing.assert_allclose(run(tmp_path / "a.onnx", images), expected, atol=1e-5 * np.abs(expected).max())
        export(model, tmp_path / "a.onnx", kind, "labels")
        labels = run(tmp_path / "a.onnx", images)
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, expected.argmax(axis=1))


def test_float16_says_how_far_off_it_is(tmp_path):
    model = network(decoder="bilinear")
    single, half = (export(model, tmp_path / f"{16 * k}.onnx", float16=k == 1) for k in range(2))
    assert 0 < single.error < 1e-5 * single.largest
    assert 100 * single.error < half.error < 0.02 * half.largest
    assert half.pixels == 2 * 64 * 64 + 45 * 70
    stored = [{array.data_type for array in onnx.load(path).graph.initializer} for path in sorted(tmp_path.iterdir())]
    assert [onnx.TensorProto.FLOAT16 in kinds for kinds in stored] == [False, True]
    assert run(tmp_path / "16.onnx", integers(1, (33, 47))).dtype == np.float32


def test_the_file_says_what_it_is(tmp_path):
    model = network()
    model.metadata["colours"] = [[k, 10 * k, 200] for k in range(5)]
    export(model, tmp_path / "a.onnx")
    proto, opened = onnx.load(tmp_path / "a.onnx"), session(tmp_path / "a.onnx")
    notes = {key: json.loads(text) for key, text in opened.get_modelmeta().custom_metadata_map.items()}
    assert (notes["classes"], notes["size"], notes["input"]) == (list("abcde"), [48, 64], "normalised")
    assert notes["palette"] == model.metadata["colours"]
    assert (notes["mean"], notes["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert notes["model"] == model.describe()
    assert (proto.producer_name, proto.producer_version) == ("segnet_scratch", __version__)
    assert [(end.name, end.shape) for end in (*opened.get_inputs(), *opened.get_outputs())] == [
        ("image", ["batch", 3, "height", "width"]),
        ("logits", ["batch", 5, "height", "width"]),
    ]


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        ("float32", lambda a: a.transpose(0, 3, 1, 2)[..., ::-1, :].astype(np.float32) if a.ndim == 4 else a),
        ("float16", lambda a: a.transpose(0, 3, 1, 2) * 1e9 if a.ndim == 4 else a),
    ],
    ids=["kernels upside down", "infinite in float16"],
)
def test_a_graph_that_computes_something_else_is_not_written(tmp_path, monkeypatch, dtype, layout):
    (tmp_path / "a.onnx").write_bytes(b"old")
    monkeypatch.setattr(exporting, "to_file_layout", layout)
    with pytest.raises(SegnetError, match=rf"not written: onnxruntime .* in {dtype}"):
        export(network(), tmp_path / "a.onnx", float16=dtype == "float16")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.onnx", b"old")]


def test_the_command_and_what_is_wrong(segnet, tmp_path, monkeypatch):
    source = tmp_path / "model.safetensors"
    weights.save(source, network(), {"classes": list("abcde"), "size": [48, 64]})
    done = segnet("export", source, tmp_path / "model.onnx", "--unpool", "codes")
    assert done.code == 0, done.err
    assert re.search(r"logits differ by at most [0-9.e-]+ \(the largest is [0-9.]+\), \d+ of 11,342 pixels", done.out)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    assert_error(segnet("export", tmp_path / "photo.jpg", tmp_path / "b.onnx"), 1, "photo.jpg", "safetensors")
    (tmp_path / "photo.jpg").unlink()
    assert_error(segnet("export", source, tmp_path / "no" / "b.onnx"), 1, tmp_path / "no", "No such file")
    assert_error(segnet("export", source, source), 2, "would overwrite")
    assert_error(segnet("export", source, tmp_path / "b.onnx", "--input", "rgb"), 2, "--input rgb", "uint8")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert_error(segnet("export", source, tmp_path / "b.onnx"), 1, "onnxruntime", "pip install 'segnet_scratch[onnx]'")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_page_runs_the_file_with_onnxruntime_alone(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/how-to/export.md").read_text(encoding="utf-8"), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    assert "segnet" not in code
    model = network(decoder="bilinear")
    export(model, tmp_path / "voc.onnx", "uint8", "labels")
    y, x = np.mgrid[:96, :128]
    photo = np.stack([2 * y, x + y, 255 - x], axis=2).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.jpg", quality=95)
    shown = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.search(r"^[a-e]: [0-9.]+%$", shown.stdout, re.M)
    read = np.array(Image.open(tmp_path / "photo.jpg"))
    labels = own_logits(model, normalise(resize_image(read, (48, 64)))[None])[0].argmax(axis=0).astype(np.uint8)
    with Image.open(tmp_path / "mask.png") as mask:
        np.testing.assert_array_equal(np.array(mask), labels.repeat(2, axis=0).repeat(2, axis=1))
        assert mask.getpalette()[:3] != mask.getpalette()[3:6]
