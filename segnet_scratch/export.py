"""SegNet as an ONNX file that other runtimes compute: the list of blocks, written as ONNX's operators.

Maps are (n, c, h, w) there, of any batch and any size: what depends on the size is computed in the graph.

Pooling indices are flat positions in the whole map (n, c, h, w) that was pooled, and what they mean where MaxUnpool is
asked for another size than twice its input's is not clear: onnxruntime counts in the size asked for, the example of
the specification in twice the input's. So maps are made even before each pool (in ceil mode a row or column is added,
in floor mode cut off) and brought back to their size after the unpool, and no such case arises.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segnet_scratch import __version__
from segnet_scratch.data import normalise
from segnet_scratch.data.drawing import Style
from segnet_scratch.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from segnet_scratch.errors import SegnetError, require
from segnet_scratch.files import write_durably
from segnet_scratch.nn.autograd import no_grad
from segnet_scratch.nn.modules import ConvUnit
from segnet_scratch.ops.normalisation.batch_norm import EPS
from segnet_scratch.segnet import Block, SegNet, to_file_layout

OPSET = 17
IR_VERSION = 8  # the file format of that opset's time, which older runtimes read too
INPUTS = ("normalised", "float", "uint8")
OUTPUTS = ("logits", "labels")
UNPOOLS = ("indices", "codes")
CHECKED = ((2, 64, 64), (1, 45, 70))  # (n, h, w) of the random images that a file is checked with
# The root mean square of the logits' errors, over that of the logits. A graph that computes something else is off by
# about 1; in between lies rounding that decided a near tie of a pool (docs/explanation/numerics.md).
_TOLERANCE = {np.dtype(np.float32): 1e-2, np.dtype(np.float16): 0.3}


@dataclass(frozen=True)
class Agreement:
    """How far onnxruntime's logits are from the model's own on random images of the shapes `CHECKED`."""

    error: float  # the largest one of a logit
    largest: float  # logit, without its sign
    differing: int  # pixels that get another class
    pixels: int


def export(
    model: SegNet,
    target: Path,
    inputs: str = "normalised",
    output: str = "logits",
    unpool: str = "indices",
    keep_batch_norm: bool = False,
    float16: bool = False,
) -> Agreement:
    """Writes a network in evaluation mode as an ONNX file, once `onnx.checker` and onnxruntime have approved of it.

    inputs: one of INPUTS, what `image` (n, 3, h, w), RGB, holds: float32 as `data.normalise` gives it; float32 in
        [0, 1]; uint8.
    output: one of OUTPUTS: `logits`, float32 (n, classes, h, w), or `labels`, uint8 (n, h, w).
    unpool: one of UNPOOLS: "indices", MaxPool's indices and MaxUnpool; "codes", the place of the maximum in its window
        and operators that every runtime has.
    keep_batch_norm: do not fold it into the convolutions.
    float16: weights and maps are float16; input and output stay what they are.

    MissingLibraryError without onnx or onnxruntime, OSError where the file cannot be written, SegnetError where
    onnxruntime computes something else; then no file is written, and one that is there stays.
    """
    onnx = require("onnx", "onnx", "ONNX files")
    runtime = require("onnxruntime", "onnx", "the check of ONNX files")
    found: list[Agreement] = []

    def content() -> Iterator[bytes]:
        graph = _Graph(onnx, model, unpool, keep_batch_norm, np.dtype(np.float16 if float16 else np.float32))
        graph.network(inputs)
        found.append(_agreement(runtime, graph.file(inputs, ["logits", "labels"]), model.eval(), inputs, graph.dtype))
        yield graph.file(inputs, [output]).SerializeToString()

    write_durably(target, content())
    return found[0]


class _Graph:
    """The nodes and constants of a graph as it grows."""

    def __init__(self, onnx: Any, model: SegNet, unpool: str, keep_batch_norm: bool, dtype: np.dtype) -> None:
        self.onnx, self.model, self.dtype = onnx, model, dtype
        self._codes, self._keep = unpool == "codes", keep_batch_norm
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._scope = "input"

    def file(self, inputs: str, outputs: list[str]) -> Any:
        """The file's content, with these outputs; checked."""
        helper, kinds = self.onnx.helper, self.onnx.TensorProto
        kind = kinds.UINT8 if inputs == "uint8" else kinds.FLOAT
        ends = {"logits": (kinds.FLOAT, ["batch", self.model.classes, "height", "width"])}
        ends |= {"labels": (kinds.UINT8, ["batch", "height", "width"])}
        nodes = [node for node in self._nodes if "labels" in outputs or not node.name.startswith("labels.")]
        image = helper.make_tensor_value_info("image", kind, ["batch", 3, "height", "width"])
        results = [helper.make_tensor_value_info(name, *ends[name]) for name in outputs]
        constants = list(self._constants.values())
        graph = helper.make_graph(nodes, self.model.architecture, [image], results, constants)
        versions = {"ir_version": IR_VERSION, "opset_imports": [helper.make_opsetid("", OPSET)]}
        producer = {"producer_name": "segnet_scratch", "producer_version": __version__}
        proto = helper.make_model(graph, **versions, **producer)
        helper.set_model_props(proto, {name: json.dumps(value) for name, value in self._notes(inputs).items()})
        self.onnx.checker.check_model(proto, full_check=True)
        return proto

    def _notes(self, inputs: str) -> dict[str, Any]:
        """What a user of the file must know; each becomes JSON in the file's metadata."""
        metadata = self.model.metadata
        style = Style.of(metadata, self.model.classes)
        classes = {"classes": list(style.names), "palette": style.palette[: len(style.names)].tolist()}
        mean, std = (array.astype(float).round(3).tolist() for array in (IMAGENET_MEAN, IMAGENET_STD))
        images = {"size": metadata.get("size"), "input": inputs, "mean": mean, "std": std}
        return classes | images | {"model": self.model.describe()}

    def network(self, inputs: str) -> None:
        """All of it: from `image` to `logits`, and on to `labels`."""
        x = self._image(inputs)
        saved: list[_Pooled] = []
        for block in self.model.blocks:
            self._scope = block.name
            if block.unpool:
                x = self._unpool(x, block, saved.pop())
            half: dict[int, dict[Any, Any]] = self.model.decoder if block.decoder else self.model.encoder
            x = self._unit(x, half[block.stage][block.index], block)
            if block.pool:
                x, pooled = self._pool(x)
                saved.append(pooled)
        self._scope = "classifier"
        classifier = self.model.classifier
        x = self._convolution(x, classifier.weight.numpy(), classifier.bias.numpy())
        self._add("Cast", x, to=self.onnx.TensorProto.FLOAT, result="logits")
        self._scope = "labels"
        labels = self._add("ArgMax", "logits", axis=1, keepdims=0)
        self._add("Cast", labels, to=self.onnx.TensorProto.UINT8, result="labels")

    def _image(self, inputs: str) -> str:
        x = "image"
        if inputs != "normalised":
            if inputs == "uint8":
                x = self._add("Cast", x, to=self.onnx.TensorProto.FLOAT)
                x = self._add("Div", x, self._constant(np.float32(255)))
            x = self._add("Sub", x, self._constant(IMAGENET_MEAN.reshape(1, 3, 1, 1)))
            x = self._add("Div", x, self._constant(IMAGENET_STD.reshape(1, 3, 1, 1)))
        return self._add("Cast", x, to=self.onnx.helper.np_dtype_to_tensor_dtype(self.dtype))

    def _unit(self, x: str, unit: ConvUnit, block: Block) -> str:
        if self._keep and unit.bn is not None:
            x = self._convolution(x, unit.conv.weight.numpy())
            means = (unit.conv.weight.device.download(b.data) for b in (unit.bn.running_mean, unit.bn.running_var))
            vectors = [self._weights(a) for a in (unit.bn.weight.numpy(), unit.bn.bias.numpy(), *means)]
            x = self._add("BatchNormalization", x, *vectors, epsilon=EPS)
        else:
            x = self._convolution(x, *unit.folded())
        return self._add("Relu", x) if block.relu else x

    def _convolution(self, x: str, weight: np.ndarray, bias: np.ndarray | None = None) -> str:
        """Weight (o, k, k, c)."""
        terms = [self._weights(array) for array in (weight, bias) if array is not None]
        kernel = list(weight.shape[1:3])
        return self._add("Conv", x, *terms, kernel_shape=kernel, pads=[side // 2 for side in kernel * 2])

    def _pool(self, x: str) -> "tuple[str, _Pooled]":
        size = self._add("Shape", x, start=2)
        odd = self._add("Mod", size, self._integers(2))
        # What is added may be 0: the maximum of a window that reaches over the edge is one of its own pixels, since
        # ReLU leaves nothing below 0, and of equals the first counts, which is the window's upper left one.
        x = self._padded(x, odd) if self.model.pooling == "ceil" else self._cut(x, self._add("Sub", size, odd))
        window: dict[str, Any] = {"kernel_shape": [2, 2], "strides": [2, 2]}
        if self.model.decoder_kind != "indices":
            return self._add("MaxPool", x, **window), _Pooled(size, odd, "")
        if not self._codes:
            indices = self._name("Indices")
            return self._add("MaxPool", x, more=[indices], **window), _Pooled(size, odd, indices)
        # The pixels of each of a window's four places, as groups of channels, in the order of the codes 0..3.
        parts = [self._name(f"place{code}") for code in range(4)]
        self._add("Split", self._add("SpaceToDepth", x, blocksize=2), result=parts[0], more=parts[1:], axis=1)
        y = self._add("Max", *parts)
        code = self._constant(np.int32(3))
        for k in (2, 1, 0):  # the first of equals last, so that it wins
            code = self._add("Where", self._add("Equal", parts[k], y), self._constant(np.int32(k)), code)
        return y, _Pooled(size, odd, code)

    def _unpool(self, x: str, block: Block, pooled: "_Pooled") -> str:
        if block.unpool == "bilinear":
            size = self._add("Concat", self._add("Shape", x, end=2), pooled.size, axis=0)
            return self._add("Resize", x, "", "", size, mode="linear", coordinate_transformation_mode="half_pixel")
        if block.unpool == "deconv":
            up: Any = self.model.decoder[block.stage]["up"]
            weight = self._weights(up.weight.numpy())
            x = self._add("ConvTranspose", x, weight, kernel_shape=[4, 4], strides=[2, 2], pads=[1, 1, 1, 1])
        elif not self._codes:
            x = self._add("MaxUnpool", x, pooled.places, kernel_shape=[2, 2], strides=[2, 2])
        else:
            zero = self._constant(self.dtype.type(0))
            here = [self._add("Equal", pooled.places, self._constant(np.int32(k))) for k in range(4)]
            parts = [self._add("Where", condition, x, zero) for condition in here]
            x = self._add("DepthToSpace", self._add("Concat", *parts, axis=1), blocksize=2)
        return self._cut(x, pooled.size) if self.model.pooling == "ceil" else self._padded(x, pooled.odd)

    def _padded(self, x: str, amounts: str) -> str:
        """The map with so many rows and columns of zeros below and to the right."""
        return self._add("Pad", x, self._add("Concat", self._integers(0, 0, 0, 0, 0, 0), amounts, axis=0))

    def _cut(self, x: str, size: str) -> str:
        """The first rows and columns of the map."""
        return self._add("Slice", x, self._integers(0, 0), size, self._integers(2, 3))

    def _weights(self, array: np.ndarray) -> str:
        with np.errstate(over="ignore"):  # the check of the file tells of float16's infinities
            return self._constant(to_file_layout(array).astype(self.dtype), self._name("weight"))

    def _integers(self, *values: int) -> str:
        return self._constant(np.array(values, np.int64))

    def _constant(self, array: Any, name: str = "") -> str:
        """Small ones are kept once, under what they hold."""
        array = np.asarray(array)
        name = name or f"{array.dtype}{array.tolist()}".replace(" ", "")
        self._constants[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def _name(self, what: str) -> str:
        return f"{self._scope}.{what}.{len(self._nodes)}.{len(self._constants)}"

    def _add(self, op: str, *inputs: str, result: str = "", more: list[str] | None = None, **attributes: Any) -> str:
        """Adds a node; the name of its (first) result."""
        name = self._name(op)
        result = result or name
        self._nodes.append(self.onnx.helper.make_node(op, inputs, [result, *(more or [])], name, **attributes))
        return result


@dataclass(frozen=True)
class _Pooled:
    """Names of what an unpool needs of its pool: the map's (h, w), what they are modulo 2, where the maxima were."""

    size: str
    odd: str
    places: str


def _agreement(runtime: Any, proto: Any, model: SegNet, inputs: str, dtype: np.dtype) -> Agreement:
    """What onnxruntime makes of the graph on the CPU against what the model does; SegnetError unless it is the same."""

    def refused(what: str) -> SegnetError:
        fix = "leave out float16" if dtype == np.float16 else "try another version of onnxruntime"
        return SegnetError(f"the ONNX file was not written: onnxruntime {runtime.__version__} {what}; {fix}")

    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in CHECKED]
    pixels = [np.stack([normalise(image) for image in some]) for some in images]
    fed = {"normalised": pixels, "float": [some / np.float32(255) for some in images], "uint8": images}[inputs]
    with no_grad():
        own = [model(some.astype(model.dtype)).numpy() for some in pixels]
    try:
        session = runtime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        found = [session.run(["logits", "labels"], {"image": some.transpose(0, 3, 1, 2)}) for some in fed]
    except Exception as error:  # its errors share no public class
        raise refused(f"cannot compute it in {dtype}: {error}") from error
    other = sum(np.count_nonzero(labels != k.argmax(axis=3)) for (_, labels), k in zip(found, own, strict=True))
    theirs = np.concatenate([logits.transpose(0, 2, 3, 1).ravel() for logits, _ in found])
    ours = np.concatenate([logits.ravel().astype(np.float64) for logits in own])
    with np.errstate(invalid="ignore"):
        errors = np.abs(theirs - ours)
        share = float(np.sqrt(np.square(errors).mean() / max(np.square(ours).mean(), 1e-30)))
    if not share <= _TOLERANCE[dtype]:  # NaN too
        raise refused(f"is off by {share:.2g} of the logits in {dtype}, expected at most {_TOLERANCE[dtype]}")
    return Agreement(float(errors.max()), float(np.abs(ours).max()), int(other), ours.size // model.classes)
