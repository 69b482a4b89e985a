"""What checkpoints hold comes back bit by bit, and what they cannot hold is refused."""

import os
import stat

import numpy as np
import pytest
import safetensors.numpy
from support.checkpoints import assert_same_tensors, entry, file_of, names_in, some_metadata, some_tensors

from segnet_scratch import checkpoint
from segnet_scratch.errors import CheckpointError


class TestRoundTrip:
    def test_tensors_and_metadata_come_back_bit_by_bit(self, tmp_path):
        path = tmp_path / "last.safetensors"
        tensors = some_tensors()
        tensors["half"][0] = np.nan
        checkpoint.save(path, tensors, some_metadata())
        loaded = checkpoint.load(path)
        assert_same_tensors(loaded.tensors, tensors)
        assert loaded.metadata == some_metadata()
        assert checkpoint.metadata_in(checkpoint.load_foreign(path)[1]) == some_metadata()

    def test_views_and_other_byte_orders_are_saved_by_value(self, tmp_path):
        base = np.arange(24, dtype=np.float32).reshape(4, 6)
        tensors = {
            "transposed": base.T,
            "strided": base[::2, ::-1],
            "fortran": np.asfortranarray(base),
            "big_endian": base.astype(">f4"),
        }
        checkpoint.save(tmp_path / "a", tensors, {})
        loaded = checkpoint.load(tmp_path / "a").tensors
        for name, array in tensors.items():
            np.testing.assert_array_equal(loaded[name], array)
            assert loaded[name].flags.c_contiguous

    def test_loaded_tensors_are_aligned_and_writable(self, tmp_path):
        checkpoint.save(tmp_path / "a", some_tensors(), {})
        for name, array in checkpoint.load(tmp_path / "a").tensors.items():
            assert array.flags.aligned, name
            assert array.flags.writeable, name

    def test_loaded_tensors_do_not_depend_on_the_file_any_more(self, tmp_path):
        checkpoint.save(tmp_path / "a", some_tensors(), {})
        ours, foreign = checkpoint.load(tmp_path / "a").tensors, checkpoint.load_foreign(tmp_path / "a")[0]
        with (tmp_path / "a").open("r+b") as file:
            file.write(bytes(2000))
            file.truncate(2000)
        assert_same_tensors(ours, some_tensors())
        assert_same_tensors(foreign, some_tensors())

    def test_same_content_gives_the_same_bytes(self, tmp_path):
        tensors = some_tensors()
        checkpoint.save(tmp_path / "a", tensors, {"x": 1, "y": 2})
        for _ in range(5):  # an order that is left to chance would differ at one of them
            checkpoint.save(tmp_path / "b", dict(reversed(tensors.items())), {"y": 2, "x": 1})
            assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_keys_that_are_numbers_become_text_as_in_json(self, tmp_path):
        checkpoint.save(tmp_path / "a", {}, {"classes": {10: "dog", 9: "cat"}, "size": (360, 480)})
        assert checkpoint.load(tmp_path / "a").metadata == {"classes": {"10": "dog", "9": "cat"}, "size": [360, 480]}

    def test_other_programs_can_read_our_files(self, tmp_path):
        tensors = some_tensors()
        checkpoint.save(tmp_path / "a", tensors, some_metadata())
        assert_same_tensors(safetensors.numpy.load_file(tmp_path / "a"), tensors)
        assert_same_tensors(safetensors.numpy.load((tmp_path / "a").read_bytes()), tensors)

    def test_permissions_follow_the_umask(self, tmp_path):
        previous = os.umask(0o027)
        try:
            checkpoint.save(tmp_path / "a", {}, {})
        finally:
            os.umask(previous)
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


class TestForeign:
    def test_files_of_the_safetensors_package(self, tmp_path):
        tensors = some_tensors()
        safetensors.numpy.save_file(tensors, tmp_path / "a", metadata={"format": "pt"})
        assert_same_tensors(checkpoint.load_foreign(tmp_path / "a")[0], tensors)
        with pytest.raises(CheckpointError, match="written by this project"):
            checkpoint.load(tmp_path / "a")

    def test_bfloat16_becomes_the_float32_of_the_same_value(self, tmp_path):
        # 1, -2.5, the smallest subnormal (2**-133), infinity and a NaN, as the upper halves of their float32
        bits = np.array([0x3F80, 0xC020, 0x0001, 0x7F80, 0x7FC1], "<u2")
        (tmp_path / "a").write_bytes(file_of({"w": entry("BF16", (5, 1), (0, 10))}, bits.tobytes()))
        weights = checkpoint.load_foreign(tmp_path / "a")[0]["w"]
        assert weights.dtype == np.float32
        expected = np.array([[1], [-2.5], [2.0**-133], [np.inf], [np.nan]], np.float32)
        np.testing.assert_array_equal(weights, expected)

    def test_bfloat16_beside_other_dtypes(self, tmp_path):
        header = {
            "a": entry("F32", (1,), (0, 4)),
            "b": entry("BF16", (), (4, 6)),
            "c": entry("BF16", (0, 2), (6, 6)),
            "d": entry("F16", (1,), (6, 8)),
        }
        data = np.float32(1.5).tobytes() + b"\x80\x3f" + np.float16(-2).tobytes()
        (tmp_path / "a").write_bytes(file_of(header, data))
        expected = {
            "a": np.array([1.5], np.float32),
            "b": np.array(1, np.float32),
            "c": np.zeros((0, 2), np.float32),
            "d": np.array([-2], np.float16),
        }
        weights = checkpoint.load_foreign(tmp_path / "a")[0]
        assert_same_tensors(weights, expected)
        assert all(array.flags.writeable for array in weights.values())

    def test_unaligned_tensors(self, tmp_path):
        header = {"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (1,), (1, 5))}
        (tmp_path / "a").write_bytes(file_of(header, b"\7" + np.float32(1.5).tobytes()))
        weights = checkpoint.load_foreign(tmp_path / "a")[0]["b"]
        assert weights.flags.aligned
        assert weights == [1.5]


class TestRefusedContent:
    @pytest.mark.parametrize(
        ("tensors", "metadata", "message"),
        [
            ({"w": np.array([object()])}, {}, "tensor w: .*object"),
            ({"w": np.array(["text"])}, {}, "tensor w"),
            ({"w": np.array([1j])}, {}, "tensor w: .*complex128"),
            ({"w": [1.0]}, {}, "tensor w: .*list"),
            ({"w": np.zeros(1, np.longdouble)}, {}, "w"),
            ({"w": np.zeros(1, "M8[s]")}, {}, "tensor w: .*datetime64"),
            ({1: np.zeros(1)}, {}, "tensor names"),
            ({"\ud800": np.zeros(1)}, {}, "printable"),
            ({"line\nfeed": np.zeros(1)}, {}, "printable"),
            ({"__metadata__": np.zeros(1)}, {}, "__metadata__"),
            ({}, {"loss": float("nan")}, "without NaN or infinity"),
            ({}, {"deep": [{"loss": float("inf")}]}, "without NaN or infinity"),
            ({}, {"loss": np.float32(1)}, "float32"),
            ({}, {"long": "x" * 10**8}, "header too large"),
        ],
    )
    def test_content_that_does_not_fit_leaves_the_old_file(self, tmp_path, tensors, metadata, message):
        path = tmp_path / "last.safetensors"
        checkpoint.save(path, some_tensors(), some_metadata())
        with pytest.raises(CheckpointError, match=message):
            checkpoint.save(path, tensors, metadata)
        assert checkpoint.load(path).metadata == some_metadata()
        assert names_in(tmp_path) == ["last.safetensors"]
