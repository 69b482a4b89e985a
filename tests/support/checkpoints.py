"""What the tests of checkpoints share: contents to save, and files made byte by byte."""

import json

import numpy as np


def some_tensors(seed=0):
    generator = np.random.default_rng(seed)
    return {
        "encoder.1.1.conv.weight": generator.standard_normal((4, 3, 3, 3), dtype=np.float32),
        "encoder.1.1.bn.bias": generator.standard_normal(4),
        "optimiser.step": np.array(17, dtype=np.int64),
        "codes": generator.integers(0, 4, (2, 5, 3), dtype=np.uint8),
        "half": generator.standard_normal(7).astype(np.float16),
        "empty": np.zeros((0, 3), np.float32),
        "entraîné": np.array([True, False]),
    }


def some_metadata(step=1):
    return {"step": step, "best": 0.1 + 0.2, "names": ["café", 'a "quoted" \\ name'], "nested": {"x": None}}


def assert_same_tensors(got, expected):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype.newbyteorder("="), name
        assert got[name].shape == array.shape, name
        assert got[name].tobytes() == array.astype(array.dtype.newbyteorder("=")).tobytes(), name


def file_of(header, data=b""):
    """The bytes of a safetensors file with a header of any content, sound or not."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())
