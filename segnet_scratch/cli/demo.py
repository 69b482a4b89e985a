"""`segnet demo`: sample data, training, evaluation and predictions in one command."""

from pathlib import Path

from segnet_scratch.cli import data, evaluation, network, options
from segnet_scratch.cli.command import command
from segnet_scratch.cli.common import app, say
from segnet_scratch.data import read_split
from segnet_scratch.run_folder import RunFolder


@command(app)
def demo(
    out: options.Folder = Path("runs/demo"), steps: options.MaybeCount = None, device: options.Device = "auto"
) -> None:
    """Train a small SegNet on synthetic sample data, evaluate it, segment images: two minutes on two CPU cores.

    Nothing else is needed. What was stopped goes on, when the command is repeated.

    Options:
        --out: Run folder; the data go into a folder beside it.
        --steps: So many training steps; the 400 of the recipe demo unless given.
    """
    run, sample = RunFolder(out), out.with_name(f"{out.name}-data")
    data.sample(sample)
    settings = [] if steps is None else [f"steps={steps}"]
    network.train(data=sample, out=out, config=["demo"], settings=settings, device=device, resume=run.config.exists())
    images = [str(sample / "JPEGImages" / f"{name}.jpg") for name in read_split(sample, "val")[:6]]
    evaluation.evaluate_command(checkpoint=run.best, data=sample, device=device, json=out / "eval.json")
    evaluation.predict(checkpoint=run.best, inputs=images, out=out / "predictions", device=device)
    say(f"scores:   {out}/eval.json")
    say(f"losses:   {run.metrics}")
    say(f"pictures: {out}/predictions/*_overlay.png")
