"""Files that are no sound checkpoints: each is refused by name, in little memory and time, and runs no code.

By default a sample of the damages; with SEGNET_TEST_FULL=1 the numbers of the list of proofs (10,000 flipped bits, cuts
at every byte of the header and 1,000 others).
"""

import json
import os
import random
import sys
import time
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
from support import FULL, count
from support.checkpoints import assert_same_tensors, entry, file_of, some_metadata, some_tensors
from support.commands import process

from segnet_scratch import checkpoint
from segnet_scratch.errors import CheckpointError

FLIPS, CUTS = count(200, 10_000), None if FULL else 100

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

PICKLE = b"cos\ngetpid\n(tR."  # calls os.getpid() where it is unpickled

# What safetensors takes although the format forbids it; what it makes of them is sound.
LENIENT = {
    "repeated tensor": file_of(b'{"w":%b,"w":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)),
    "tensor with more keys": file_of({"w": entry(more=1)}, bytes(4)),
    "metadata is null": file_of({"__metadata__": None, "w": entry()}, bytes(4)),
}


@contextmanager
def within_limits(size):
    """Reading a file of this size takes less than twice its memory (and what messages need) and a second of work."""
    tracemalloc.start()
    began = time.process_time()
    try:
        yield
        assert time.process_time() - began < 1
        assert tracemalloc.get_traced_memory()[1] < 2 * size + 300_000
    finally:
        tracemalloc.stop()


def saved(tmp_path):
    """(path, content, length of the header with its length) of a sound checkpoint, large beside its header."""
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, {**some_tensors(), "large": np.arange(1000.0)}, some_metadata())
    content = path.read_bytes()
    return path, content, 8 + int.from_bytes(content[:8], "little")


class TestDamage:
    @pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
    def test_malformed_files_are_refused_by_name(self, tmp_path, content):
        path = tmp_path / "odd.safetensors"
        path.write_bytes(content)
        for read in (checkpoint.load, checkpoint.load_foreign):
            with (
                within_limits(len(content)),
                pytest.raises(CheckpointError, match=r"odd\.safetensors: .*(expected|got).*; "),
            ):
                read(path)

    @pytest.mark.parametrize("content", LENIENT.values(), ids=LENIENT.keys())
    def test_tolerated_files_are_foreign_and_give_a_sound_tensor(self, tmp_path, content, monkeypatch):
        path = tmp_path / "odd.safetensors"
        path.write_bytes(content)
        tensors, texts = checkpoint.load_foreign(path)
        assert_same_tensors(tensors, {"w": np.zeros(1, np.float32)})
        assert checkpoint.metadata_in(texts) == {}
        monkeypatch.setattr(checkpoint, "_read_tensor", None)  # gigabytes, perhaps
        with pytest.raises(CheckpointError, match=r"odd\.safetensors: .*written by this project \(segnet convert"):
            checkpoint.load(path)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", "an empty file"),
            (b"\x08\x07\x12\x07pytorch", "begins with b"),
            (b'{\n  "weight_map": {}}', "another kind"),
            (b"\x1f\x8b\x08\0" + bytes(20), "a header that is no JSON object"),
        ],
        ids=["nothing", "ONNX", "an index", "gzip"],
    )
    def test_other_kinds_of_files_are_called_so(self, tmp_path, content, said):
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            checkpoint.load(tmp_path / "a.safetensors")

    def test_every_flipped_bit_is_noticed(self, tmp_path):
        path, sound, header = saved(tmp_path)
        chooser = random.Random(1)
        bits = [chooser.randrange(8 * len(sound)) for _ in range(FLIPS // 2)]
        bits += [chooser.randrange(8 * header) for _ in range(FLIPS // 2)]  # the header has the more delicate bits
        for bit in bits:
            damaged = bytearray(sound)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with within_limits(len(sound)), pytest.raises(CheckpointError, match=r"last\.safetensors"):
                checkpoint.load(path)
        path.write_bytes(sound)
        checkpoint.load(path)

    def test_messages_show_hostile_names_short_and_escaped(self, tmp_path):
        for odd in (entry(offsets=(4, 0)), entry("F8_E4M3", (4,))):
            (tmp_path / "a").write_bytes(file_of({"\x1b[2J" + "n" * 500_000: odd}, bytes(4)))
            with pytest.raises(CheckpointError, match=r"x1b\[2Jnnn") as raised:
                checkpoint.load_foreign(tmp_path / "a")[0]
            assert str(raised.value).isprintable()
            assert len(str(raised.value)) < 300 + 300  # what is quoted, and the rest with the path

    def test_a_file_cut_anywhere_is_refused(self, tmp_path):
        path, sound, header = saved(tmp_path)
        chooser = random.Random(2)
        lengths = [*range(header), *chooser.sample(range(header, len(sound)), 1000)]
        for length in lengths if CUTS is None else chooser.sample(lengths, CUTS):
            path.write_bytes(sound[:length])
            with within_limits(length), pytest.raises(CheckpointError, match=r"last\.safetensors"):
                checkpoint.load(path)
        path.write_bytes(sound + b"\0")
        with pytest.raises(CheckpointError, match=r"last\.safetensors"):
            checkpoint.load(path)

    def test_a_file_cut_while_it_is_read(self, tmp_path):
        """In a process of its own: a file that is mapped, as safetensors does, would end it with SIGBUS."""
        checkpoint.save(tmp_path / "a", {"w": np.zeros(1_000_000)}, {})
        code = (
            "import os, sys; from segnet_scratch import checkpoint\n"
            "place_of = checkpoint._place_of\n"
            "def then_cut(name, entry):\n"
            "    os.truncate(sys.argv[1], 10_000)\n"
            "    return place_of(name, entry)\n"
            "checkpoint._place_of = then_cut\n"
            "try:\n"
            "    checkpoint.load(sys.argv[1])\n"
            "except checkpoint.CheckpointError as error:\n"
            "    print(error)\n"
        )
        ended = process(tmp_path / "a", code=code)
        assert ended.returncode == 0, ended.stderr
        assert "cut off while it was read" in ended.stdout

    def test_no_file_runs_code(self, tmp_path):
        """Python reports what it executes, compiles, imports and starts to an audit hook."""
        for number, content in enumerate([*MALFORMED.values(), *LENIENT.values(), PICKLE]):
            (tmp_path / f"odd{number}").write_bytes(content)
        checkpoint.save(tmp_path / "sound", some_tensors(), some_metadata())
        code = (
            "import sys; from pathlib import Path; from segnet_scratch import checkpoint\n"
            "def read(path):\n"
            "    for read in (checkpoint.load, checkpoint.load_foreign):\n"
            "        try:\n"
            "            read(path)\n"
            "        except checkpoint.CheckpointError:\n"
            "            pass\n"
            "files = sorted(Path(sys.argv[1]).iterdir())\n"
            "for path in files: read(path)\n"  # what the libraries import late
            "runs = {'exec', 'compile', 'import', 'marshal.loads', 'pickle.find_class', 'os.system', 'os.exec'}\n"
            "runs |= {'subprocess.Popen', 'ctypes.dlopen', 'ctypes.call_function'}\n"
            "def hook(event, arguments):\n"
            "    if event in runs: print(event, arguments, flush=True)\n"
            "sys.addaudithook(hook)\n"
            "for path in files: read(path)\n"
            "print('read', len(files))\n"
            "import pickle; pickle.loads(Path(sys.argv[2]).read_bytes())\n"  # the hook does notice
        )
        (tmp_path / "pickles").mkdir()
        (tmp_path / "pickles" / "a").write_bytes(PICKLE)
        ended = process(tmp_path, tmp_path / "pickles" / "a", code=code)
        lines = ended.stdout.splitlines()
        assert lines[0] == f"read {len(MALFORMED) + len(LENIENT) + 3}", ended
        assert any(line.startswith("pickle.find_class") for line in lines)

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
            checkpoint.load_foreign(path)[0]
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
            with pytest.raises(CheckpointError, match="metadata that is no JSON object"):
                checkpoint.load(tmp_path / "a")
            assert checkpoint.metadata_in(checkpoint.load_foreign(tmp_path / "a")[1]) == {}

    def test_metadata_with_infinity_cannot_be_slipped_in(self, tmp_path):
        checkpoint.save(tmp_path / "a", {}, {"loss": 0.125})
        sound = (tmp_path / "a").read_bytes()
        for number in (b"1e999", b"  NaN"):
            (tmp_path / "a").write_bytes(sound.replace(b"0.125", number))
            with pytest.raises(CheckpointError, match="checksum"):
                checkpoint.load(tmp_path / "a")

    @pytest.mark.parametrize("read", [checkpoint.load, checkpoint.load_foreign])
    def test_paths_that_are_no_files(self, tmp_path, read):
        with pytest.raises(CheckpointError, match=r"nothing\.safetensors: .*No such file"):
            read(tmp_path / "nothing.safetensors")
        with pytest.raises(CheckpointError, match="is a folder; name a file in it"):
            read(tmp_path)
        with pytest.raises(CheckpointError, match="is a folder; name a file in it"):
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
            "        checkpoint.load_foreign(path)[0]\n"
            "    except checkpoint.CheckpointError as error:\n"
            "        assert 'allocate' not in str(error), error\n"
            "try:\n"
            "    checkpoint.load(folder / 'a')\n"
            "except checkpoint.CheckpointError as error:\n"
            "    print(error)\n"
        )
        ended = process(tmp_path, code=code)
        assert ended.returncode == 0, ended.stderr
        if not ended.stdout:
            pytest.skip("this system does not limit the memory of a process")
        assert "memory is short: Unable to al" in ended.stdout

    def test_a_length_beyond_the_file_costs_no_memory(self, tmp_path):
        (tmp_path / "a").write_bytes((4 << 20).to_bytes(8, "little") + b"{}")
        with within_limits(10), pytest.raises(CheckpointError):
            checkpoint.load(tmp_path / "a")

    def test_a_header_of_megabytes_is_refused_before_it_is_read(self, tmp_path):
        path = tmp_path / "large.safetensors"
        path.write_bytes(file_of(b"{" + b" " * (5 << 20) + b"}"))
        for read in (checkpoint.load, checkpoint.load_foreign):
            with within_limits(0), pytest.raises(CheckpointError, match=r"large\.safetensors.*header of 5242882 bytes"):
                read(path)
