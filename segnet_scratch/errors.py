"""The project's own errors. Each message names the thing, what was expected, what was got, and the fix."""


class SegnetError(Exception):
    """Base of every error raised on purpose; the command line prints its message without a traceback."""


class ShapeError(SegnetError):
    """Arrays whose shapes do not fit together or do not fit the operation."""


class DTypeError(SegnetError):
    """An array or scalar of an element type that the operation does not take."""


class DeviceError(SegnetError):
    """A device that is missing, or an array that lives on another device."""


class CompileError(SegnetError):
    """A kernel source that does not compile, or no compiler to compile it with."""


class LaunchError(SegnetError):
    """A launch refused by the gate: argument count, contiguity, size, grid or block limits."""


class KernelFault(SegnetError):
    """A fault of a kernel noticed while it ran: divergent barrier, overrun of shared memory."""


class DataError(SegnetError):
    """A data set, image, mask or label that cannot be used; the message names the file."""


class ConfigError(SegnetError):
    """An unknown configuration key, a value of the wrong type or out of range."""


class CheckpointError(SegnetError):
    """A weights file that is missing, damaged, or made for another model."""


class TrainingError(SegnetError):
    """Training cannot go on: a loss that is not finite, a run folder that is already in use."""


class MissingLibraryError(SegnetError):
    """A library of an optional feature that is not installed; the message names the extra that brings it."""
