"""Predictions made elsewhere, scored as our own are; classes of another name or order."""

import json
import logging

import numpy as np
import pytest
from PIL import Image
from support.evaluation import network, segment

from segnet_scratch import SegNetBasic, weights
from segnet_scratch.boundary import Boundary
from segnet_scratch.data import SAMPLE_CLASSES, VOCDataset, save_indexed_png
from segnet_scratch.errors import DataError
from segnet_scratch.evaluate import check_classes, evaluate, score
from segnet_scratch.inference import Segmenter

SIZE = (40, 56)


@pytest.fixture
def predicted(sample, tmp_path):
    """A data set, a network, and its predictions as files."""
    dataset, model = VOCDataset(sample, "val"), network()
    (tmp_path / "predictions").mkdir()
    for index, name in enumerate(dataset.ids):
        labels = segment(model, dataset.sample(index)[0], SIZE).labels
        save_indexed_png(tmp_path / "predictions" / f"{name}.png", labels)
    return dataset, model, tmp_path / "predictions"


@pytest.mark.parametrize("boundary", [None, *Boundary])
def test_files_score_as_the_network_that_made_them(predicted, boundary):
    if boundary is Boundary.authors:
        pytest.importorskip("scipy")
    dataset, model, folder = predicted
    found, expected = score(folder, dataset, boundary), evaluate(Segmenter(model, SIZE), dataset, boundary)
    assert found.per_image == expected.per_image
    assert {**found.to_json(), "loss": 0} == {**expected.to_json(), "loss": 0}
    assert found.to_json()["loss"] is None
    assert 0 < found.scores.miou < 1


def test_the_command_prints_and_writes_the_scores(predicted, segnet, tmp_path):
    dataset, _, folder = predicted
    result, rows = tmp_path / "scores.json", tmp_path / "rows.csv"
    done = segnet("score", folder, "--data", dataset.root, "--json", result, "--per-image", rows)
    assert done.code == 0, done.err
    assert "mean IoU" in done.out
    assert json.loads(result.read_text())["miou"] == score(folder, dataset).scores.miou
    assert len(rows.read_text().splitlines()) == 1 + len(dataset)


def test_predictions_that_are_none_are_named(predicted, segnet):
    dataset, _, folder = predicted
    path = folder / f"{dataset.ids[1]}.png"
    labels = np.asarray(Image.open(path))
    for content, hint in (
        (labels[:-1], r"height x width\), its ground truth"),
        (np.full_like(labels, 6), r"label 6; expected 0\.\.5"),
        (np.full_like(labels, 255), r"label 255"),
        (np.stack([labels] * 3, axis=2), r"colour-coded"),
    ):
        Image.fromarray(content).save(path)
        with pytest.raises(DataError, match=rf"{path.name}: .*{hint}"):
            score(folder, dataset)
    path.unlink()
    done = segnet("score", folder, "--data", dataset.root)
    assert done.code == 1
    assert f"1 of {len(dataset)} predictions are missing" in done.err


def test_classes_that_change_places_are_refused_and_other_names_are_asked_about(sample, caplog):
    dataset, model = VOCDataset(sample, "val"), network()
    check_classes(model, dataset)  # its checkpoint tells nothing
    model.metadata["classes"] = list(SAMPLE_CLASSES)
    check_classes(model, dataset)
    assert not caplog.records
    model.metadata["classes"] = ["background", "disc", *SAMPLE_CLASSES[2:]]
    with caplog.at_level(logging.WARNING):
        evaluate(Segmenter(model, SIZE), dataset)
    assert (
        "class 1 is 'circle', for the checkpoint 'disc' (1 of 6 classes differ); do they mean the same?" in caplog.text
    )
    swapped = list(SAMPLE_CLASSES)
    swapped[1:3] = swapped[2:0:-1]
    model.metadata["classes"] = swapped
    with pytest.raises(DataError, match=r"class 1 is 'circle', for the checkpoint 'square' \(2 of 6.*change places"):
        evaluate(Segmenter(model, SIZE), dataset)


def test_a_start_from_other_classes_leaves_the_classifier(tmp_path):
    source = network()
    weights.save(tmp_path / "m.safetensors", source, {"classes": list(SAMPLE_CLASSES), "size": list(SIZE)})
    for names, taken in ((SAMPLE_CLASSES, True), (("sky", *SAMPLE_CLASSES[1:]), False), (None, True)):
        model = SegNetBasic(6, 1 / 16, "numpy", seed=5)
        told = weights.initialise(model, tmp_path / "m.safetensors", names)
        assert ("all weights but the classifier" not in told) == taken
        same = {name: (array == source.state_dict()[name]).all() for name, array in model.state_dict().items()}
        assert same.pop("classifier.weight") == taken
        assert all(equal for name, equal in same.items() if not name.startswith("classifier"))
