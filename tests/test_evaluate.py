"""Evaluation against a slow one written out by hand, and the resizing of logits."""

import shutil
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pytest
from PIL import Image
from support import raises
from support.evaluation import bilinear, confusion_of, network, softmax

from segnet_scratch import get_device, tensor
from segnet_scratch.boundary import Boundary, boundary_f1
from segnet_scratch.data import VOID, VOCDataset, normalise, resize_image, resize_mask
from segnet_scratch.errors import DataError
from segnet_scratch.evaluate import evaluate
from segnet_scratch.inference import Inference, Segmenter, classify
from segnet_scratch.metrics import scores
from segnet_scratch.ops.op import spec_of
from segnet_scratch.ops.resampling.resize_bilinear import ResizeBilinearForward

SIZE = (40, 56)


def resize(model, logits, size):
    return ResizeBilinearForward.plan(spec_of(logits), tuple(size))(model.device, x=logits).y


def slow_evaluation(model, dataset, size):
    """(IoU by class, global accuracy, class accuracy, loss), one image and one pixel at a time."""
    model.eval()
    classes = model.classes
    confusion = np.zeros((classes, classes), np.int64)
    losses = []
    for index in range(len(dataset)):
        image, mask, _ = dataset.sample(index)
        logits = model(normalise(resize_image(image, size))[None]).numpy()[0].astype(np.float64)
        small = resize_mask(mask, size)
        for i, j in np.argwhere(small != VOID):
            scores = logits[i, j] - logits[i, j].max()
            losses.append(np.log(np.exp(scores).sum()) - scores[small[i, j]])
        full = bilinear(logits, *mask.shape)
        for i, j in np.argwhere(mask != VOID):
            confusion[mask[i, j], np.argmax(full[i, j])] += 1
    right = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - right
    iou = [right[k] / union[k] if union[k] else np.nan for k in range(classes)]
    recall = [right[k] / confusion[k].sum() for k in range(classes) if confusion[k].any()]
    return iou, right.sum() / confusion.sum(), np.mean(recall), np.mean(losses)


@pytest.fixture(scope="module")
def mixed(sample, tmp_path_factory):
    """The sample's validation split with one image cut to another, odd size."""
    root = tmp_path_factory.mktemp("mixed") / "data"
    shutil.copytree(sample, root)
    dataset = VOCDataset(root, "val")
    image, mask = Image.open(dataset.image_path(1)), Image.open(dataset.mask_path(1))
    image.crop((3, 0, 40, 33)).save(dataset.image_path(1), quality=95)
    mask.crop((3, 0, 40, 33)).save(dataset.mask_path(1))
    return dataset


@pytest.mark.parametrize("device", ["numpy", "host"])
def test_scores_are_those_of_a_slow_evaluation(mixed, device):
    model = network(device=device)
    found = evaluate(Segmenter(model, SIZE, batch=3), mixed)
    iou, global_accuracy, class_accuracy, loss = slow_evaluation(network(), mixed, SIZE)
    # A pixel whose two best logits are equal to rounding may go either way.
    np.testing.assert_allclose(found.scores.iou, iou, atol=2e-3)
    assert found.scores.miou == pytest.approx(np.nanmean(iou), abs=1e-3)
    assert found.scores.global_accuracy == pytest.approx(global_accuracy, abs=1e-3)
    assert found.scores.class_accuracy == pytest.approx(class_accuracy, abs=1e-3)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.images == len(mixed) == 4
    assert found.scores.pixels == sum(int((mixed.sample(k)[1] != VOID).sum()) for k in range(4))


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 9])
def test_the_batch_size_does_not_change_the_scores(mixed, batch):
    told = []
    found = evaluate(Segmenter(network(), SIZE, batch=batch), mixed, workers=0, advance=told.append)
    reference = evaluate(Segmenter(network(), SIZE, batch=4), mixed)
    np.testing.assert_allclose(found.scores.iou, reference.scores.iou, atol=1e-3)
    assert found.loss == pytest.approx(reference.loss, rel=1e-5)
    assert told == [1] * 4


def test_it_is_repeatable_and_leaves_the_model_alone(mixed):
    model = network()
    before = {name: array.copy() for name, array in model.state_dict().items()}
    for training in (True, False):
        model.train(training)
        results = [evaluate(Segmenter(model, SIZE), mixed) for _ in range(2)]
        assert results[0].to_json() == results[1].to_json()
        assert model.training == model.classifier.training == training
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


@dataclass
class Oracle:
    """In place of a network: logits that are right, from the colour that each class has been given."""

    classes: int
    mistaken: bool = False
    training: bool = False
    device = get_device("numpy")
    dtype = np.dtype(np.float32)
    metadata = MappingProxyType({})

    def eval(self):
        return self

    def train(self, training=True):
        return self

    def __call__(self, images):
        grey = np.rint((images.numpy()[..., 0] * 0.229 + 0.485) * 255 / 20).astype(
            int
        )  # class k is drawn in the grey 20 k
        if self.mistaken:
            grey = np.where(grey == 2, 1, grey)
        return tensor(10 * (np.arange(self.classes) == grey[..., None]).astype(np.float32), "numpy")


@pytest.fixture
def flat(tmp_path):
    """Images whose grey tells the class, in blocks of 8 pixels; class 3 of the four does not occur."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\n")
    rng = np.random.default_rng(0)
    for name in ("x", "y"):
        mask = rng.integers(0, 3, (4, 5)).repeat(8, axis=0).repeat(8, axis=1).astype(np.uint8)
        Image.fromarray((mask * 20)[..., None].repeat(3, axis=2)).save(tmp_path / "JPEGImages" / f"{name}.png")
        mask[:2] = VOID
        Image.fromarray(mask).save(tmp_path / "SegmentationClass" / f"{name}.png")
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("x\ny\n")
    return VOCDataset(tmp_path, "val")


def test_perfect_predictions_score_one(flat):
    found = evaluate(Segmenter(Oracle(4), (32, 40)), flat)
    assert found.scores.miou == found.scores.global_accuracy == found.scores.class_accuracy == 1.0
    assert found.loss < 1e-3
    assert np.isnan(found.scores.iou[3])
    assert found.to_json()["iou"] == {"a": 1.0, "b": 1.0, "c": 1.0, "d": None}


def test_mistakes_score_as_worked_out_by_hand(flat):
    found = evaluate(Segmenter(Oracle(4, mistaken=True), (32, 40)), flat)
    truth = np.concatenate([flat.sample(k)[1].reshape(-1) for k in range(2)])
    a, b, c = (int((truth == k).sum()) for k in range(3))
    assert min(a, b, c) > 0
    np.testing.assert_allclose(found.scores.iou[:3], [1, b / (b + c), 0])
    assert found.scores.miou == pytest.approx((1 + b / (b + c)) / 3)
    assert found.scores.global_accuracy == pytest.approx((a + b) / (a + b + c))
    assert found.scores.class_accuracy == pytest.approx(2 / 3)


def test_another_number_of_classes_is_refused(mixed):
    with raises(DataError, str(mixed.root), match="has 6 classes, the model 21"):
        evaluate(Segmenter(network(classes=21), SIZE), mixed)


def test_logits_of_nan_score_but_are_no_json_number(mixed):
    model = network()
    model.classifier.bias.data[...] = np.nan
    found = evaluate(Segmenter(model, SIZE), mixed).to_json()
    assert found["loss"] is None
    assert 0 <= found["global_accuracy"] <= 1


# Averages, boundaries, single images


@pytest.mark.parametrize("device", ["numpy", "host"])
def test_averages_score_as_worked_out_slowly(mixed, device):
    """Flip and two scales: softmax of logits at the image's size, the mean of four, its largest class."""
    found = evaluate(Segmenter(network(device=device), SIZE, Inference((0.8, 1.0), flip=True)), mixed, Boundary.csurka)
    model = network()
    confusion, contours = np.zeros((6, 6), np.int64), []
    for index in range(len(mixed)):
        image, mask, _ = mixed.sample(index)
        total = 0
        for height, width in ((32, 45), SIZE):
            for step in (1, -1):
                logits = model(normalise(resize_image(image[:, ::step], (height, width)))[None]).numpy()[0]
                total = total + softmax(bilinear(logits, *mask.shape)[:, ::step])
        prediction = total.argmax(axis=2)
        confusion += confusion_of(mask, prediction, 6)
        contours.append(np.mean(list(boundary_f1(mask, prediction).values())))
    expected = scores(confusion)
    np.testing.assert_allclose(found.scores.iou, expected.iou, atol=2e-3)
    assert np.abs(found.scores.confusion - confusion).sum() <= 0.002 * confusion.sum()
    assert found.boundary_f1 == pytest.approx(np.mean(contours), abs=3e-3)
    assert found.to_json()["boundary_f1"] == found.boundary_f1
    assert found.to_json()["loss"] is None  # an average has no logits at the network's size
    plain = evaluate(Segmenter(network(), SIZE), mixed)
    assert np.abs(plain.scores.confusion - confusion).sum() > 0.01 * confusion.sum()  # it makes a difference


def test_every_image_has_its_scores(mixed):
    found = evaluate(Segmenter(network(), SIZE, batch=3), mixed, Boundary.csurka)
    assert [image.id for image in found.per_image] == list(mixed.ids)
    for index, image in enumerate(found.per_image):
        alone = evaluate(Segmenter(network(), SIZE), OneImage(mixed, index), Boundary.csurka)
        assert image.miou == pytest.approx(alone.scores.miou, abs=2e-3)
        assert image.global_accuracy == pytest.approx(alone.scores.global_accuracy, abs=2e-3)
        assert image.pixels == alone.scores.pixels
        assert image.boundary_f1 == pytest.approx(alone.boundary_f1, abs=5e-3)
    assert found.boundary_f1 == pytest.approx(np.mean([image.boundary_f1 for image in found.per_image]))
    assert all(image.boundary_f1 is None for image in evaluate(Segmenter(network(), SIZE), mixed).per_image)


class OneImage:
    """A data set cut down to one image."""

    def __init__(self, dataset, index):
        self._dataset, self._index = dataset, index
        self.root, self.classes, self.names = dataset.root, dataset.classes, dataset.names

    def __len__(self):
        return 1

    def sample(self, index):
        return self._dataset.sample(self._index)


def test_an_image_without_a_contour_does_not_count_for_boundary_f1(flat):
    path = flat.mask_path(1)
    mask = np.array(Image.open(path))
    mask[:] = 1
    Image.fromarray(mask).save(path)
    found = evaluate(Segmenter(Oracle(4), (32, 40)), flat, Boundary.csurka)
    assert np.isnan(found.per_image[1].boundary_f1)
    assert found.boundary_f1 == found.per_image[0].boundary_f1 > 0.5


# Resizing logits


def test_classes_are_taken_after_resizing():
    # Between a weak 0 and a strong 1 the stronger one gets more than half of the way.
    model = network()
    logits = np.array([[1.0, 0.0], [0.0, 9.0]], np.float32).reshape(1, 1, 2, 2)
    found = classify(model, resize(model, logits, (1, 8)))
    assert found.shape == (1, 1, 8)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[0, 0], [0, 0, 1, 1, 1, 1, 1, 1])
