"""The sum of gradients over the ranks, begun while backward still makes more of them."""

from segnet_scratch.ops.elementwise.cast import Cast
from segnet_scratch.ops.op import Buffers, spec_of
from segnet_scratch.parallel.communicator import WAIT, Communicator, Transfer
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.observe import carry_out

BUCKET = 25 << 20  # bytes that are summed at once: enough to fill a network, few enough to begin early


class GradientSum:
    """Takes gradients as backward makes them, and sums them over the ranks in buckets, beside what is computed.

    `rounded`: those of float32 travel as bfloat16, half the bytes. Each rank's gradient then errs relatively by up to
    2^-8 of itself, and so does the sum, each time that it is rounded: once where MPI carries it in float32, after every
    addition in NCCL.
    """

    def __init__(self, ranks: Communicator, device: Device, rounded: bool = False) -> None:
        self._ranks, self._device, self._rounded = ranks, device, rounded
        self._waiting: list[Array] = []

    def add(self, gradient: Array) -> None:
        """A gradient is done, and nobody touches it until `finish`."""
        if self._ranks.size == 1:
            return
        self._waiting.append(gradient)
        if sum(array.nbytes for array in self._waiting) >= BUCKET:
            self._begin()

    def finish(self, loss: Array) -> None:
        """What comes after this in the device's line of work finds the sums, also that of the loss."""
        if self._ranks.size == 1:
            return
        self._begin()
        with self._device.beside():
            self._ranks.arrays.sum(self._device, [loss])
        carry_out(Transfer(WAIT, 0), self._device.join)

    def _begin(self) -> None:
        arrays, self._waiting = self._waiting, []
        with self._device.beside():
            if not self._rounded:
                self._ranks.arrays.sum(self._device, arrays)
                return
            halves = [Cast.plan(spec_of(array))(self._device, x=array).y for array in arrays]
            self._ranks.arrays.sum(self._device, halves)
            for half, array in zip(halves, arrays, strict=True):
                Cast.plan(spec_of(half)).run(self._device, Buffers(x=half, y=array))
