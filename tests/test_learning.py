"""Networks learn four real images by heart: what no wrong gradient, loss or update lets them do.

The images are taken at the network's size, so that nothing is lost in resizing. By default SegNet-Basic learns them at
48x48; with SEGNET_TEST_FULL=1 SegNet at 64x64 too. That `host` and `numpy` learn alike is in test_train.py.
"""

import pytest
from PIL import Image
from support import FULL, real

from segnet_scratch.config import Config
from segnet_scratch.data import VOCDataset
from segnet_scratch.data.palette import save_indexed_png
from segnet_scratch.data.transforms import resize_image, resize_mask
from segnet_scratch.train import Listener, Trainer

RECIPES = {"segnet-basic": {"size": 48, "width": 0.5, "lr": 0.1, "steps": 120}}
if FULL:
    RECIPES["segnet"] = {"size": 64, "width": 0.25, "lr": 0.05, "steps": 240}


def four_images(folder, size):
    """A data set of the first four training images, reduced; they are its validation split as well."""
    source = VOCDataset(real("data", "VOCdevkit", "VOC2012"), "train")
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    for index in range(4):
        image, mask, name = source.sample(index)
        Image.fromarray(resize_image(image, (size, size))).save(folder / "JPEGImages" / f"{name}.png")
        save_indexed_png(folder / "SegmentationClass" / f"{name}.png", resize_mask(mask, (size, size)))
    for split in ("train", "val"):
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(source.ids[:4]))
    return folder


class Scores(Listener):
    """Those of the last validation."""

    def validated(self, trainer, evaluation):
        self.scores = evaluation.scores


@pytest.mark.parametrize("model", RECIPES)
def test_four_real_images_are_learnt_by_heart(tmp_path, model):
    recipe = RECIPES[model]
    data = four_images(tmp_path / "data", recipe["size"])
    fixed = {"batch": 4, "schedule": "poly", "decay": 0.0, "scale": (1, 1), "flip": False, "workers": 0}
    config = Config(model=model, **recipe, **fixed, validate_every=recipe["steps"])
    listener = Scores()
    assert Trainer(config, data, tmp_path / "run", "numpy").run(listener)
    assert listener.scores.pixels > 3 * recipe["size"] ** 2  # void is the least of it
    assert listener.scores.global_accuracy >= 0.99
    assert listener.scores.miou >= 0.95
