"""The parts of the proof, each one property: most are proven for every row of the op table, on every device there is.

    base.py          what a part is; the parts that go over the cases of the rows
    compilation.py   every kernel compiles, for the host and for every GPU
    reference.py     results against the reference, guard zones, memory of any contents; integers; the host's bits
    accuracy.py      errors of float32 sums beside a chain's
    gradients.py     gradient checks of ops and networks
    same_bits.py     orders of threads and blocks, variables without a value, sanitizers, the same bits again
    refusals.py      inputs that must be refused, and hostile ones; edges of the loss
    gate.py          launches that must be refused
    steps.py         training steps: the same bits again; on a GPU other devices, graphs, fused engine, uploads, NCCL
    learning.py      that it learns
    compute_sanitizer.py  NVIDIA's four tools

`segnet verify` runs them all (lab/proof/verify.py), the tests run the same ones at smaller figures.
"""

from segnet_scratch.lab.proof.parts.accuracy import Accuracy
from segnet_scratch.lab.proof.parts.base import Part
from segnet_scratch.lab.proof.parts.compilation import CudaBuilds, GpuBuilds, HostBuilds
from segnet_scratch.lab.proof.parts.compute_sanitizer import ComputeSanitizer
from segnet_scratch.lab.proof.parts.gate import Gate
from segnet_scratch.lab.proof.parts.gradients import Gradients, Networks
from segnet_scratch.lab.proof.parts.learning import Demo, Learning
from segnet_scratch.lab.proof.parts.reference import HostBits, Integers, Reference
from segnet_scratch.lab.proof.parts.refusals import HostileInputs, Losses, Refusals
from segnet_scratch.lab.proof.parts.same_bits import Orders, Repeats, Sanitizers, Variables
from segnet_scratch.lab.proof.parts.steps import Engine, Graphs, Nccl, OtherDevices, Timing, Training, Uploads

# In the order of the report, in which a GPU has each round of them: first what shows most.
PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        *(HostBuilds(), CudaBuilds(), GpuBuilds(), Gate(), Reference()),
        *(Graphs(), Uploads(), Timing(), Engine(), OtherDevices(), Nccl(), Training(), Learning()),
        *(Integers(), HostBits(), ComputeSanitizer()),
        *(Refusals(), HostileInputs(), Losses(), Accuracy(), Repeats(), Gradients(), Networks()),
        *(Orders(), Variables(), Sanitizers(), Demo()),
    )
}
