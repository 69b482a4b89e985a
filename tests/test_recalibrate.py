"""Batch-norm statistics counted anew: those of all images together, whatever was there, and a checkpoint of them."""

import numpy as np
import pytest

from segnet_scratch import SegNet, SegNetBasic, load, weights
from segnet_scratch.config import Config
from segnet_scratch.data import VOCDataset
from segnet_scratch.errors import DataError, TrainingError
from segnet_scratch.evaluate import evaluate
from segnet_scratch.inference import Segmenter
from segnet_scratch.nn.modules import BatchNorm2d
from segnet_scratch.recalibrate import recalibrate
from segnet_scratch.train import Trainer

F32, F64 = np.float32, np.float64


def batches(dtype=F64, sizes=(4, 4, 3), height=33, width=40, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, height, width, 3)).astype(dtype) + k for k, n in enumerate(sizes)]


def statistics(model):
    return {name: model.device.download(buffer.data).copy() for name, buffer in model.named_buffers().items()}


@pytest.mark.parametrize("device", ["numpy", "host"])
@pytest.mark.parametrize(("cls", "dtype"), [(SegNet, F64), (SegNetBasic, F32)])
def test_they_are_those_of_all_batches_together(monkeypatch, device, cls, dtype):
    model = cls(5, 1 / 32, device, dtype=dtype)
    seen = {id(layer): [] for layer in model.named_modules(BatchNorm2d).values()}
    forward = BatchNorm2d.forward

    def watched(layer, x):
        seen[id(layer)].append(x.numpy().astype(F64).reshape(-1, x.shape[3]))
        return forward(layer, x)

    monkeypatch.setattr(BatchNorm2d, "forward", watched)
    assert recalibrate(model, batches(dtype)) == 11
    tolerance = 1e-6 if dtype == F32 else 1e-12
    found = statistics(model)
    for name, layer in model.named_modules(BatchNorm2d).items():
        assert len(seen[id(layer)]) == 3
        rows = np.concatenate(seen[id(layer)])
        np.testing.assert_allclose(found[f"{name}.running_mean"], rows.mean(0), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(found[f"{name}.running_var"], rows.var(0, ddof=1), rtol=tolerance, atol=tolerance)
    assert len(found) == 2 * len(seen)


def test_what_was_there_does_not_matter_and_dropout_is_off():
    model, other = (SegNet(5, 1 / 32, "numpy", dropout=True, dtype=F64) for _ in range(2))
    for buffer in other.named_buffers().values():
        buffer.data.fill(np.inf)
    other.train().set_random_state(3, 4)
    for network in (model, other):
        recalibrate(network, batches())
        assert not any(module.training for module in (network, *network.named_modules(BatchNorm2d).values()))
    first, second = statistics(model), statistics(other)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    without = SegNet(5, 1 / 32, "numpy", dtype=F64)
    recalibrate(without, batches())
    np.testing.assert_array_equal(
        statistics(without)["decoder.1.1.bn.running_var"], first["decoder.1.1.bn.running_var"]
    )


def test_training_goes_on_with_the_usual_momentum():
    model = SegNetBasic(5, 1 / 16, "numpy", dtype=F64)
    recalibrate(model, batches())
    before = statistics(model)["encoder.1.1.bn.running_mean"]
    model.train()(batches(seed=5)[2])
    after = statistics(model)["encoder.1.1.bn.running_mean"]
    recalibrate(model, [batches(seed=5)[2]])
    of_batch = statistics(model)["encoder.1.1.bn.running_mean"]
    np.testing.assert_allclose(after, 0.9 * before + 0.1 * of_batch, rtol=1e-12, atol=1e-14)


def test_refused():
    model = SegNetBasic(5, 1 / 16, "numpy")
    with pytest.raises(DataError, match="no batch of images"):
        recalibrate(model, [])
    model.fold_batch_norm()
    with pytest.raises(TrainingError, match=r"folded.*without fold=True"):
        recalibrate(model, batches(F32))


@pytest.fixture(scope="module")
def trained(sample, tmp_path_factory):
    """A checkpoint of some steps, whose statistics were then lost."""
    out = tmp_path_factory.mktemp("trained")
    settings = {"model": "segnet-basic", "width": 0.25, "size": 32, "batch": 4, "lr": 0.1, "workers": 0, "steps": 30}
    trainer = Trainer(Config(**settings), sample, out / "run", "numpy")
    trainer.run()
    model = trainer.model.eval()
    for name, buffer in model.named_buffers().items():
        buffer.data.fill(0.01 if name.endswith("var") else 3.0)
    weights.save(out / "lost.safetensors", model, trainer._metadata())
    return out


def test_the_command_makes_a_checkpoint_that_scores_again(segnet, sample, trained):
    done = segnet(
        *("bn-recalibrate", trained / "lost.safetensors", "--data", sample, "--out", trained / "new.safetensors"),
        *("--device", "numpy", "--batch", 3),
    )
    assert done.code == 0, done.err
    assert "new.safetensors: batch-norm statistics of 6 images of train" in done.out  # 8 images: 2 batches of 3
    val = VOCDataset(sample, "val")
    losses = {
        name: evaluate(Segmenter(load(trained / name, "numpy"), (32, 32)), val).loss
        for name in ("lost.safetensors", "new.safetensors", "run/best.safetensors")
    }
    assert losses["new.safetensors"] < 1.2 * losses["run/best.safetensors"] < 0.5 * losses["lost.safetensors"]
    metadata = load(trained / "new.safetensors", "numpy").metadata
    assert metadata["recalibrated"] == {"split": "train", "images": 6, "batch": 3}
    lost = load(trained / "lost.safetensors", "numpy").metadata
    assert {key: value for key, value in metadata.items() if key != "recalibrated"} == lost


def test_the_number_of_batches_and_the_seed_choose_the_images(segnet, sample, trained):
    made = {}
    for name, options in {"a": (), "b": (), "c": ("--seed", 1)}.items():
        out = trained / f"{name}.safetensors"
        arguments = ("--data", sample, "--out", out, "--device", "numpy", "--batch", 2, "--batches", 2)
        done = segnet("bn-recalibrate", trained / "lost.safetensors", *arguments, *options)
        assert "statistics of 4 images" in done.out
        made[name] = out.read_bytes()
    assert made["a"] == made["b"] != made["c"]


def test_a_missing_checkpoint_or_split_is_named(segnet, sample, trained):
    out = trained / "none.safetensors"
    for checkpoint, split, part in (("nothing", "train", "nothing"), ("lost.safetensors", "nowhere", "nowhere")):
        done = segnet("bn-recalibrate", trained / checkpoint, "--data", sample, "--out", out, "--split", split)
        assert done.code == 1
        assert part in done.err
        assert "Traceback" not in done.err
    assert not out.exists()
