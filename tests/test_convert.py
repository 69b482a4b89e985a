import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from segnet_scratch import SegNet, SegNetBasic, checkpoint, load
from segnet_scratch import weights as model_files
from segnet_scratch.cli import main
from segnet_scratch.convert import from_pytorch, read_map, to_pytorch
from segnet_scratch.errors import CheckpointError, ConfigError

DOCS = Path(__file__).parents[1] / "docs" / "pytorch.md"
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
    assert to_pytorch(ours, theirs, {}) == len(model.state_dict())
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
    to_pytorch(tmp_path / "ours.safetensors", tmp_path / "back.safetensors", names)
    assert "down.first.convolution.weight" in checkpoint.load_foreign(tmp_path / "back.safetensors")


def test_names_that_do_not_fit(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"conv1.weight": np.zeros((4, 3, 3, 3), np.float32)}, path)
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors: no SegNet under our names.*it has conv1\.weight.*--map"
    ):
        from_pytorch(path, tmp_path / "out.safetensors", {})
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("text", ["a = 3", "a = [", '"a" = "x"\n"b" = "x"'])
def test_maps_that_are_none(tmp_path, text):
    (tmp_path / "names.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"names\.toml"):
        read_map(tmp_path / "names.toml")


def test_fine_tuning_to_other_classes_resets_the_classifier(tmp_path):
    path = tmp_path / "five.safetensors"
    source = trained(classes=5)
    model_files.save(path, source, {})
    model = SegNet(7, 1 / 16, "numpy", seed=9)
    fresh = model.state_dict()
    assert "all weights but the classifier" in model_files.initialise(model, path)
    state, before = model.state_dict(), source.state_dict()
    for name in state:
        expected = fresh[name] if name.startswith("classifier.") else before[name]
        assert np.array_equal(state[name], expected)


def test_the_command(tmp_path, capsys):
    model_files.save(tmp_path / "ours.safetensors", trained(), {})
    argv = ["convert", str(tmp_path / "ours.safetensors"), str(tmp_path / "theirs.safetensors"), "--to", "pytorch"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["segnet", *argv])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0
    assert "arrays" in capsys.readouterr().out


def test_the_module_in_the_documentation_loads_our_weights(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle of this test: pip install -e .[oracle]")
    model = trained(classes=21)
    model_files.save(tmp_path / "ours.safetensors", model, {})
    to_pytorch(tmp_path / "ours.safetensors", tmp_path / "out.safetensors", {})
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL).group(1)
    code = code.replace('"out.safetensors"', repr(str(tmp_path / "out.safetensors")))
    narrow = "((4, 4), (8, 8), (16,) * 3, (32,) * 3, (32,) * 3)"
    space = {}
    exec(code.replace("model = SegNet(21)", f"model = SegNet(21, {narrow})"), space)
    with torch.no_grad():
        theirs = space["model"].eval()(torch.from_numpy(IMAGES).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    ours = model(IMAGES).numpy()
    assert np.abs(theirs - ours).max() <= 1e-4 * np.abs(ours).max()
