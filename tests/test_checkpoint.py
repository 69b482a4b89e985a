import errno
import itertools
import json
import os
import random
import stat
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from segnet_scratch import checkpoint
from segnet_scratch.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[1]


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


class TestRoundTrip:
    def test_tensors_and_metadata_come_back_bit_by_bit(self, tmp_path):
        path = tmp_path / "last.safetensors"
        tensors = some_tensors()
        tensors["half"][0] = np.nan
        checkpoint.save(path, tensors, some_metadata())
        loaded = checkpoint.load(path)
        assert_same_tensors(loaded.tensors, tensors)
        assert loaded.metadata == some_metadata()
        assert checkpoint.read_metadata(path) == some_metadata()

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
        ours, foreign = checkpoint.load(tmp_path / "a").tensors, checkpoint.load_foreign(tmp_path / "a")
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
        assert checkpoint.load(tmp_path / "a").metadata == {
            "classes": {"10": "dog", "9": "cat"},
            "size": [360, 480],
        }

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
        assert_same_tensors(checkpoint.load_foreign(tmp_path / "a"), tensors)
        with pytest.raises(CheckpointError, match="written by this project"):
            checkpoint.load(tmp_path / "a")

    def test_our_own_files(self, tmp_path):
        checkpoint.save(tmp_path / "a", some_tensors(), some_metadata())
        assert_same_tensors(checkpoint.load_foreign(tmp_path / "a"), some_tensors())

    def test_bfloat16_becomes_the_float32_of_the_same_value(self, tmp_path):
        # 1, -2.5, the smallest subnormal (2**-133), infinity and a NaN, as the upper halves of their float32
        bits = np.array([0x3F80, 0xC020, 0x0001, 0x7F80, 0x7FC1], "<u2")
        (tmp_path / "a").write_bytes(file_of({"w": entry("BF16", (5, 1), (0, 10))}, bits.tobytes()))
        weights = checkpoint.load_foreign(tmp_path / "a")["w"]
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
        weights = checkpoint.load_foreign(tmp_path / "a")
        assert_same_tensors(weights, expected)
        assert all(array.flags.writeable for array in weights.values())

    def test_unaligned_tensors(self, tmp_path):
        header = {"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (1,), (1, 5))}
        (tmp_path / "a").write_bytes(file_of(header, b"\7" + np.float32(1.5).tobytes()))
        weights = checkpoint.load_foreign(tmp_path / "a")["b"]
        assert weights.flags.aligned
        assert weights == [1.5]


MALFORMED = {
    "no bytes": b"",
    "seven bytes": b"1234567",
    "no header": bytes(8),
    "header length 2**64 - 1": b"\xff" * 8 + b"{}",
    "header longer than the file": (100).to_bytes(8, "little") + b"{}",
    "header far longer than the file": (10**8).to_bytes(8, "little") + b"{}",
    "header length above the library's cap": (10**8 + 1).to_bytes(8, "little") + b"{}",
    "zip archive, as a PyTorch file": b"PK\x03\x04" + bytes(200),
    "pickle": b"\x80\x04\x95" + bytes(200),
    "text": b"version https://git-lfs.github.com/spec/v1\n",
    "header is a list": file_of(b"[]"),
    "header is cut JSON": file_of(b'{"w":'),
    "header is UTF-16": file_of("{}".encode("utf-16-le")),
    "header is no UTF-8": file_of(b'{"\xff":1}'),
    "header nested deep": file_of(b'{"a":' + b"[" * 100_000),
    "number of 5,000 digits": file_of(b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"),
    "metadata is a list": file_of({"__metadata__": []}),
    "metadata value is a number": file_of({"__metadata__": {"a": 1}}),
    "tensor is a list": file_of({"w": []}),
    "tensor without offsets": file_of({"w": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "unknown dtype": file_of({"w": entry("F8_E4M3", (4,))}, bytes(4)),
    "dtype is a list": file_of({"w": entry(["F32"])}, bytes(4)),
    "shape is a number": file_of({"w": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, bytes(4)),
    "negative sides": file_of({"w": entry(shape=(-1, -1))}, bytes(4)),
    "side is true": file_of({"w": entry(shape=(True,))}, bytes(4)),
    "side is a float": file_of({"w": entry(shape=(1.0,))}, bytes(4)),
    "more sides than NumPy takes": file_of({"w": entry(shape=(1,) * 65)}, bytes(4)),
    "sides overflow": file_of({"w": entry(shape=(2**62, 4, 2**62))}, bytes(4)),
    "empty, but sides overflow": file_of({"w": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}),
    "shape larger than its bytes": file_of({"w": entry(shape=(2,))}, bytes(4)),
    "bytes that are no whole element": file_of({"w": entry(offsets=(0, 3))}, bytes(3)),
    "one offset": file_of({"w": entry(offsets=(4,))}, bytes(4)),
    "offsets backwards": file_of({"w": entry(offsets=(4, 0))}, bytes(4)),
    "overlap": file_of({"a": entry(), "b": entry()}, bytes(4)),
    "hole": file_of({"a": entry(), "b": entry(offsets=(8, 12))}, bytes(12)),
    "data cut off": file_of({"w": entry()}, bytes(3)),
    "data too long": file_of({"w": entry()}, bytes(5)),
}

# What safetensors takes although the format forbids it; what it makes of them is sound.
LENIENT = {
    "repeated tensor": file_of(b'{"w":%b,"w":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)),
    "tensor with more keys": file_of({"w": entry(more=1)}, bytes(4)),
    "metadata is null": file_of({"__metadata__": None, "w": entry()}, bytes(4)),
}


class TestDamage:
    @pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
    def test_malformed_files_are_refused_by_name(self, tmp_path, content):
        path = tmp_path / "odd.safetensors"
        path.write_bytes(content)
        for read in (checkpoint.load, checkpoint.read_metadata, checkpoint.load_foreign):
            tracemalloc.start()
            try:
                with pytest.raises(CheckpointError, match=r"odd\.safetensors: .*(expected|got).*; "):
                    read(path)
                assert tracemalloc.get_traced_memory()[1] < 2 * len(content) + 300_000
            finally:
                tracemalloc.stop()

    @pytest.mark.parametrize("content", LENIENT.values(), ids=LENIENT.keys())
    def test_tolerated_files_are_foreign_and_give_a_sound_tensor(self, tmp_path, content):
        path = tmp_path / "odd.safetensors"
        path.write_bytes(content)
        assert_same_tensors(checkpoint.load_foreign(path), {"w": np.zeros(1, np.float32)})
        for read in (checkpoint.load, checkpoint.read_metadata):
            with pytest.raises(CheckpointError, match=r"odd\.safetensors: .*written by this project; "):
                read(path)

    def test_every_flipped_bit_is_noticed(self, tmp_path):
        path = tmp_path / "last.safetensors"
        checkpoint.save(path, some_tensors(), some_metadata())
        sound = path.read_bytes()
        header_bits = 8 * (8 + int.from_bytes(sound[:8], "little"))
        chooser = random.Random(1)
        bits = [chooser.randrange(8 * len(sound)) for _ in range(100)]
        bits += [chooser.randrange(header_bits) for _ in range(100)]  # the header has the more delicate bits
        for bit in bits:
            damaged = bytearray(sound)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"last\.safetensors"):
                checkpoint.load(path)
        path.write_bytes(sound)
        checkpoint.load(path)

    def test_messages_show_hostile_names_short_and_escaped(self, tmp_path):
        # The first is quoted by safetensors, the second by this project.
        for odd in (entry(offsets=(4, 0)), entry("F8_E4M3", (4,))):
            (tmp_path / "a").write_bytes(file_of({"\x1b[2J" + "n" * 500_000: odd}, bytes(4)))
            with pytest.raises(CheckpointError, match=r"x1b\[2Jnnn") as raised:
                checkpoint.load_foreign(tmp_path / "a")
            assert str(raised.value).isprintable()
            assert len(str(raised.value)) < 300 + 300  # what is quoted, and the rest with the path

    def test_a_file_cut_anywhere_is_refused(self, tmp_path):
        path = tmp_path / "last.safetensors"
        checkpoint.save(path, some_tensors(), some_metadata())
        sound = path.read_bytes()
        for length in random.Random(2).sample(range(len(sound)), 100):
            path.write_bytes(sound[:length])
            with pytest.raises(CheckpointError, match=r"last\.safetensors"):
                checkpoint.load(path)
        path.write_bytes(sound + b"\0")
        with pytest.raises(CheckpointError, match=r"last\.safetensors"):
            checkpoint.load(path)

    def test_exchanged_content_is_noticed(self, tmp_path):
        """Changes that leave a sound file: only the checksum tells them."""
        path = tmp_path / "last.safetensors"
        checkpoint.save(path, {"aa": np.ones((1, 2), np.float32), "bb": np.zeros(2, np.float32)}, {"step": 7})
        sound = path.read_bytes()
        changes = [
            (b'"aa"', b'"ab"'),
            (b'"F32"', b'"I32"'),
            (b"[1,2]", b"[2,1]"),
            (b'\\"step\\": 7', b'\\"step\\": 8'),
            (b'\\"step\\": 7', b'\\"step\\":7 '),  # the same to a JSON parser
            (np.ones(2, np.float32).tobytes(), np.ones(2, np.float32).tobytes()[::-1]),
        ]
        for before, after in changes:
            assert before in sound
            path.write_bytes(sound.replace(before, after, 1))
            checkpoint.load_foreign(path)
            with pytest.raises(CheckpointError, match="checksum"):
                checkpoint.load(path)

    def test_metadata_alone_does_not_read_the_tensors(self, tmp_path):
        path = tmp_path / "last.safetensors"
        checkpoint.save(path, some_tensors(), some_metadata())
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        assert checkpoint.read_metadata(path) == some_metadata()
        with pytest.raises(CheckpointError, match="checksum"):
            checkpoint.load(path)

    def test_a_later_format_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(checkpoint, "FORMAT", "2")
        checkpoint.save(tmp_path / "a", {}, {})
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match="format '2', not 1"):
            checkpoint.load(tmp_path / "a")

    def test_metadata_that_is_no_object_is_refused(self, tmp_path):
        not_an_object = '{"format": "1", "metadata": [], "sha256": ""}'
        for text in ("", "[]", "7", "{", "{}", "[" * 100_000, not_an_object):
            (tmp_path / "a").write_bytes(file_of({"__metadata__": {"segnet_scratch": text}}))
            for read in (checkpoint.load, checkpoint.read_metadata):
                with pytest.raises(CheckpointError, match="metadata that is no JSON object"):
                    read(tmp_path / "a")

    def test_metadata_with_infinity_cannot_be_slipped_in(self, tmp_path):
        checkpoint.save(tmp_path / "a", {}, {"loss": 0.125})
        sound = (tmp_path / "a").read_bytes()
        for number in (b"1e999", b"  NaN"):
            (tmp_path / "a").write_bytes(sound.replace(b"0.125", number))
            with pytest.raises(CheckpointError, match="checksum"):
                checkpoint.load(tmp_path / "a")

    @pytest.mark.parametrize("read", [checkpoint.load, checkpoint.read_metadata, checkpoint.load_foreign])
    def test_paths_that_are_no_files(self, tmp_path, read):
        with pytest.raises(CheckpointError, match=r"nothing\.safetensors: .*No such file"):
            read(tmp_path / "nothing.safetensors")
        with pytest.raises(CheckpointError, match="directory"):
            read(tmp_path)
        with pytest.raises(CheckpointError, match="directory"):
            read(".")
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match=r"pipe: .*device"):
            read(tmp_path / "pipe")

    def test_the_message_points_to_the_other_checkpoint(self, tmp_path):
        last, best = tmp_path / "last.safetensors", tmp_path / "best.safetensors"
        checkpoint.save(best, {}, {})
        last.write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"use .*best\.safetensors, or train anew"):
            checkpoint.load(last)
        best.unlink()
        with pytest.raises(CheckpointError, match="use another copy of it, or train anew"):
            checkpoint.load(last)

    @pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on private memory, and /proc")
    def test_memory_of_a_load_and_a_save_stays_near_the_size_of_the_file(self, tmp_path):
        """Under a limit of the system, which also counts what safetensors takes beside Python."""
        for number, content in enumerate(MALFORMED.values()):
            (tmp_path / f"odd{number}").write_bytes(content)
        code = (
            "import resource, sys, numpy; from pathlib import Path; from segnet_scratch import checkpoint\n"
            "def limit(more):\n"
            "    used = int(Path('/proc/self/status').read_text().split('VmData:')[1].split()[0]) * 1024\n"
            "    resource.setrlimit(resource.RLIMIT_DATA, (int(used + more), resource.RLIM_INFINITY))\n"
            "folder, size = Path(sys.argv[1]), 32 << 20\n"
            "tensors = {f'w{i}': numpy.full(size // 16, i, numpy.float32) for i in range(4)}\n"
            "limit(2.2 * size)\n"  # safetensors builds the file's bytes, then copies them for Python
            "checkpoint.save(folder / 'a', tensors, {})\n"
            "del tensors\n"
            "for read in (checkpoint.load, checkpoint.load_foreign):\n"
            "    limit(1.2 * size)\n"
            "    read(folder / 'a')\n"
            "limit(4 << 20)\n"
            "for path in folder.glob('odd*'):\n"
            "    try:\n"
            "        checkpoint.load_foreign(path)\n"
            "    except checkpoint.CheckpointError as error:\n"
            "        assert 'allocate' not in str(error), error\n"
            "try:\n"
            "    checkpoint.load(folder / 'a')\n"
            "except checkpoint.CheckpointError as error:\n"
            "    print(error)\n"
        )
        ended = subprocess.run(
            [sys.executable, "-B", "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert ended.returncode == 0, ended.stderr
        if not ended.stdout:
            pytest.skip("this system does not limit the memory of a process")
        assert "Unable to allocate 32.0 MiB" in ended.stdout


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


class Calls:
    """Records the system calls of a save and lets one of them fail, or every write fall short."""

    NAMES = ("open", "write", "fsync", "close", "replace")

    def __init__(self, monkeypatch, fail_at=None, error=errno.EIO, longest_write=None):
        self.log = []
        self.fail_at, self.error, self.longest_write = fail_at, error, longest_write
        for name in self.NAMES:
            monkeypatch.setattr(checkpoint.os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name, call):
        def wrapped(*arguments, **keywords):
            self.log.append((name, self._target(name, arguments)))
            if len(self.log) - 1 == self.fail_at:
                if name == "close":
                    call(*arguments)  # the descriptor is gone even where close reports an error
                raise OSError(self.error, os.strerror(self.error))
            if name == "write" and self.longest_write:
                arguments = (arguments[0], arguments[1][: self.longest_write])
            return call(*arguments, **keywords)

        return wrapped

    @staticmethod
    def _target(name, arguments):
        if name in ("open", "replace"):
            return "directory" if os.path.isdir(arguments[0]) else "file"  # noqa: PTH112
        return "directory" if stat.S_ISDIR(os.fstat(arguments[0]).st_mode) else "file"


class TestDurability:
    def test_the_order_of_the_calls(self, tmp_path, monkeypatch):
        calls = Calls(monkeypatch)
        checkpoint.save(tmp_path / "last.safetensors", some_tensors(), some_metadata())
        monkeypatch.undo()
        assert [call for call, _ in itertools.groupby(calls.log)] == [
            ("open", "directory"),
            ("open", "file"),
            ("write", "file"),
            ("fsync", "file"),
            ("close", "file"),
            ("replace", "file"),
            ("fsync", "directory"),
            ("close", "directory"),
        ]

    @pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES])
    def test_whichever_call_fails_a_complete_file_stays(self, tmp_path, monkeypatch, error):
        path = tmp_path / "last.safetensors"
        with monkeypatch.context() as patch:
            calls = Calls(patch, longest_write=500).log  # several writes, so that later ones fail too
            checkpoint.save(path, some_tensors(1), some_metadata(1))
        assert len(calls) >= 10
        for failing, call in enumerate(calls):
            checkpoint.save(path, some_tensors(0), some_metadata(0))
            with monkeypatch.context() as patch:
                Calls(patch, fail_at=failing, error=error, longest_write=500)
                message = rf"last\.safetensors: could not be saved: {os.strerror(error)}"
                with pytest.raises(CheckpointError, match=message):
                    checkpoint.save(path, some_tensors(1), some_metadata(1))
            replaced = call in (("fsync", "directory"), ("close", "directory"))
            assert checkpoint.load(path).metadata == some_metadata(1 if replaced else 0)
            assert names_in(tmp_path) == ["last.safetensors"]

    def test_short_writes_are_continued(self, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            calls = Calls(patch, longest_write=7)
            checkpoint.save(tmp_path / "a", some_tensors(), some_metadata())
        assert len(calls.log) > 100
        assert_same_tensors(checkpoint.load(tmp_path / "a").tensors, some_tensors())

    def test_a_write_of_nothing_is_an_error_and_no_endless_loop(self, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, "write", lambda descriptor, data: 0)
            with pytest.raises(CheckpointError, match="could not be saved"):
                checkpoint.save(tmp_path / "a", some_tensors(), {})
        assert names_in(tmp_path) == []

    def test_a_directory_that_cannot_be_synced_at_all_is_accepted(self, tmp_path, monkeypatch):
        sync = os.fsync

        def fsync(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            sync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, "fsync", fsync)
            checkpoint.save(tmp_path / "a", {}, {"step": 3})
        assert checkpoint.load(tmp_path / "a").metadata == {"step": 3}

    def test_an_interrupt_leaves_no_temporary(self, tmp_path, monkeypatch):
        def interrupted(descriptor):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, "fsync", interrupted)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(tmp_path / "a", some_tensors(), {})
        assert names_in(tmp_path) == []

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and resource limits")
    def test_a_full_disk(self, tmp_path):
        """A limit on the size of a file stands for the full disk: the write itself is refused half way."""
        path = tmp_path / "last.safetensors"
        checkpoint.save(path, {"w": np.zeros(10)}, {"step": 1})
        code = (
            "import resource, signal, sys, numpy; from segnet_scratch import checkpoint\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
            "checkpoint.save(sys.argv[1], {'w': numpy.zeros(100_000)}, {'step': 2})\n"
        )
        ended = subprocess.run([sys.executable, "-B", "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode != 0
        assert "last.safetensors: could not be saved" in ended.stderr
        assert checkpoint.load(path).metadata == {"step": 1}
        assert names_in(tmp_path) == ["last.safetensors"]

    def test_missing_directory(self, tmp_path):
        with pytest.raises(CheckpointError, match="No such file or directory"):
            checkpoint.save(tmp_path / "nowhere" / "a", {}, {})

    def test_target_is_a_directory(self, tmp_path):
        (tmp_path / "a").mkdir()
        with pytest.raises(CheckpointError, match="directory"):
            checkpoint.save(tmp_path / "a", {}, {})
        assert names_in(tmp_path) == ["a"]
        with pytest.raises(CheckpointError, match="could not be saved"):
            checkpoint.save("/", {}, {})

    def test_kill_while_saving(self, tmp_path):
        """SIGKILL at random moments: the file loads and is never older than the last save that returned."""
        path = tmp_path / "last.safetensors"
        checkpoint.save(path, {}, {"step": 0})
        code = (
            "import os, sys, time, numpy; from segnet_scratch import checkpoint\n"
            # Slow writes: most kills then fall into a save rather than between two.
            "write = os.write\n"
            "os.write = lambda file, data: (write(file, data), time.sleep(0.005))[0]\n"
            "for step in range(int(sys.argv[2]), 1_000_000):\n"
            "    checkpoint.save(sys.argv[1], {'w': numpy.full(300_000, step, 'f4')}, {'step': step})\n"
            "    print(step, flush=True)\n"
        )
        chooser = random.Random(3)
        reached, orphans = 0, 0
        for _ in range(10):
            child = subprocess.Popen(
                [sys.executable, "-B", "-c", code, str(path), str(reached + 1)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert child.stdout.readline() == f"{reached + 1}\n"  # it is up, and in the middle of saving
            time.sleep(chooser.uniform(0, 0.02))
            child.kill()
            acknowledged = [reached + 1, *map(int, child.stdout.read().split())][-1]
            child.wait()
            child.stdout.close()
            loaded = checkpoint.load(path)
            reached = loaded.metadata["step"]
            assert reached in (acknowledged, acknowledged + 1)
            assert (loaded.tensors["w"] == reached).all()
            orphans += len(checkpoint.sweep_temporaries(tmp_path))
            assert names_in(tmp_path) == ["last.safetensors"]
        assert orphans > 0  # else every kill fell between two saves and showed nothing


class TestSweep:
    def test_only_our_own_temporaries_go(self, tmp_path):
        ours = [tmp_path / f".{name}.0123456789abcdef.segnet-tmp" for name in ("best.safetensors", "last")]
        others = [
            ".last.safetensors.tmp",
            "last.safetensors.0123456789abcdef.segnet-tmp",
            ".last.safetensors.0123456789ABCDEF.segnet-tmp",
            ".last.safetensors.0123456789abcdef.segnet-tmp.txt",
            "last.safetensors",
        ]
        for name in [*ours, *others]:
            (tmp_path / name).write_bytes(b"x")
        (tmp_path / ".folder.0123456789abcdef.segnet-tmp").mkdir()
        (tmp_path / ".link.0123456789abcdef.segnet-tmp").symlink_to(tmp_path / "last.safetensors")
        assert checkpoint.sweep_temporaries(tmp_path) == ours
        left = set(names_in(tmp_path))
        assert left == {
            *others,
            ".folder.0123456789abcdef.segnet-tmp",
            ".link.0123456789abcdef.segnet-tmp",
        }

    def test_it_knows_the_name_that_a_save_uses(self, tmp_path, monkeypatch):
        names = []

        def replace(source, target):
            names.append(Path(source))
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, "replace", replace)
            with pytest.raises(CheckpointError):
                checkpoint.save(tmp_path / "last.safetensors", {}, {})
        names[0].write_bytes(b"left by a kill")
        assert names[0].parent == tmp_path
        assert checkpoint.sweep_temporaries(tmp_path) == names

    def test_missing_directory(self, tmp_path):
        with pytest.raises(CheckpointError, match="nowhere"):
            checkpoint.sweep_temporaries(tmp_path / "nowhere")


def test_a_header_of_megabytes_is_refused_before_the_library_reads_it(tmp_path):
    path = tmp_path / "large.safetensors"
    header = b"{" + b" " * (5 << 20) + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    for read in (checkpoint.load, checkpoint.load_foreign, checkpoint.read_metadata):
        with pytest.raises(CheckpointError, match=r"large\.safetensors.*header of 5242882 bytes"):
            read(path)
