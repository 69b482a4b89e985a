"""`segnet eval` and `predict`: what is done with a trained network."""

from pathlib import Path
from typing import Annotated

import typer

from segnet_scratch import weights
from segnet_scratch.cli.common import (
    CheckpointArgument,
    DataOption,
    DeviceOption,
    JsonOption,
    SizeOption,
    app,
    console,
    input_size,
    say,
)
from segnet_scratch.data import VOCDataset
from segnet_scratch.device import get_device
from segnet_scratch.display import evaluation_progress, scores_table, write_json
from segnet_scratch.evaluate import evaluate
from segnet_scratch.predict import predict_files


@app.command(name="eval")
def evaluate_command(
    checkpoint: CheckpointArgument,
    data: DataOption,
    split: Annotated[str, typer.Option(help="Name of the list in ImageSets/Segmentation.")] = "val",
    device: DeviceOption = "auto",
    size: SizeOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 4,
    json: JsonOption = None,
) -> None:
    """Score a checkpoint by the VOC protocol: one confusion matrix over the whole split, void ignored.

    The image is resized to the network's input size and the logits bilinearly back to the size of the ground truth.
    """
    model = weights.load(checkpoint, get_device(device))
    dataset = VOCDataset(data, split)
    sides = input_size(checkpoint, model, size)
    with evaluation_progress(console, len(dataset)) as advance:
        evaluation = evaluate(model, dataset, sides, batch, advance=advance)
    console.print(scores_table(evaluation))
    write_json(json, {**evaluation.to_json(), "split": split, "checkpoint": str(checkpoint)})


@app.command()
def predict(
    checkpoint: CheckpointArgument,
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the results.", file_okay=False)],
    logits: Annotated[bool, typer.Option("--logits", help="Also write NAME.npy, float32 (H, W, classes).")] = False,
    device: DeviceOption = "auto",
    size: SizeOption = None,
    json: JsonOption = None,
) -> None:
    """Segment images: NAME.png (class indices, VOC palette) and NAME_overlay.png (with a legend), in the image's size.

    Example: segnet predict runs/voc/best.safetensors photos/*.jpg --out predictions
    """
    model = weights.load(checkpoint, get_device(device))
    names = model.metadata.get("classes") or [f"class {k}" for k in range(model.classes)]
    results = []
    for prediction in predict_files(model, images, out, input_size(checkpoint, model, size), names, logits):
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in list(prediction.shares.items())[:4])
        say(f"{prediction.overlay}: {shares}")
        files = {"image": prediction.image, "labels": prediction.labels, "overlay": prediction.overlay}
        if prediction.logits:
            files["logits"] = prediction.logits
        results.append({**{key: str(path) for key, path in files.items()}, "shares": prediction.shares})
    write_json(json, results)
