"""Videos and cameras, on a short synthetic clip."""

import os
import stat
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import real
from support.evaluation import network, segment

from segnet_scratch import files
from segnet_scratch.data.drawing import Style
from segnet_scratch.errors import ConfigError, DataError
from segnet_scratch.inference import Inference, Segmenter
from segnet_scratch.video import Film, Video, _Clock, find_video, opened_film, plan_videos, predict_video, upright

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'segnet_scratch[video]'")

NAMES = ("background", "circle", "square", "triangle", "star", "ring")
SIZE = (32, 48)


@pytest.fixture(scope="module")
def model():
    return network()


def pictures(count, height, width):
    """Frames that differ, smooth enough to come out of the codec nearly unchanged."""
    ramp = np.linspace(0, 1, width)
    for k in range(count):
        wave = 127 + 100 * np.sin(2 * np.pi * (ramp + k / count))
        yield np.broadcast_to(wave[None, :, None], (height, width, 3)).astype(np.uint8)


def write_clip(path, frames, rate=10, shown=None):
    """A clip; `shown` are the frames' numbers on the clock of `rate`, if not one after the other."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "5"})
        for k, frame in enumerate(frames):
            if k == 0:
                stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "yuv420p"
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = shown[k] if shown else k, Fraction(1, rate)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def read_clip(path):
    with av.open(str(path)) as container:
        return [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def blocks(picture, side=8):
    """Mean colours of squares: the codec blurs colours at their edges."""
    height, width = picture.shape[0] // side * side, picture.shape[1] // side * side
    return picture[:height, :width].reshape(height // side, side, width // side, side, 3).mean(axis=(1, 3))


def run(model, path, out, inference=None, **options):
    video = find_video(str(path))
    (target,) = plan_videos([video], out)
    return predict_video(Segmenter(model, SIZE, inference), video, target, Style(NAMES), **options)


def test_a_video_is_on_the_disk_before_it_has_its_name(model, tmp_path, monkeypatch):
    """A power failure leaves the old file or the new one."""
    (tmp_path / "out").mkdir()
    target, synced = tmp_path / "out" / "clip_overlay.mp4", []
    sync = files.os.fsync

    def noted(descriptor):
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), target.exists()))
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", noted)
    run(model, write_clip(tmp_path / "clip.mp4", pictures(2, 32, 48)), tmp_path / "out")
    assert synced == [(False, False), (True, True)]
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_every_frame_is_segmented_and_shown_with_a_legend(model, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", pictures(7, 50, 90))
    told = []
    done = run(model, clip, tmp_path / "new" / "out", watch=lambda *numbers: told.append(numbers))
    assert done.overlay == tmp_path / "new" / "out" / "clip_overlay.mp4"
    assert (done.source, done.frames, done.interrupted) == (str(clip), 7, False)
    assert [numbers[:2] for numbers in told] == [(k, 7) for k in range(1, 8)]
    assert told[-1][2] == done.frames_per_second > 0
    originals, results = read_clip(clip), read_clip(done.overlay)
    assert [time for time, _ in results] == [time for time, _ in originals]
    for (_, original), (_, result) in zip(originals, results, strict=True):
        assert result.shape[0] > 50 + 16
        assert result.shape[1] % 2 == result.shape[0] % 2 == 0
        expected = blocks(Style(NAMES).blend(original, segment(model, original, SIZE).labels))
        found = blocks(result[:50, :90])
        assert np.abs(found - expected).max() < 12
        assert np.abs(found - blocks(original)).max() > 30
        assert (result[54:].reshape(-1, 3) > 200).all(axis=1).mean() > 0.2  # the legend's white
    assert sorted(path.name for path in done.overlay.parent.iterdir()) == ["clip_overlay.mp4"]


@pytest.mark.parametrize("start", [0, 90])
def test_times_between_frames_are_kept_from_0_on(model, tmp_path, start):
    shown = [start + k for k in (0, 1, 5, 12)]
    clip = write_clip(tmp_path / "a.mkv", pictures(4, 32, 48), rate=20, shown=shown)
    assert read_clip(clip)[0][0] == pytest.approx(start / 20)
    done = run(model, clip, tmp_path / "out")
    assert [time for time, _ in read_clip(done.overlay)] == pytest.approx([0, 0.05, 0.25, 0.6], abs=2e-3)


@pytest.mark.parametrize("size", [(33, 47), (32, 46)])
def test_odd_sizes(model, tmp_path, size):
    path = tmp_path / "a.gif"  # takes odd sizes, H.264 does not
    with av.open(str(path), "w") as container:
        stream = container.add_stream("gif", rate=10)
        stream.height, stream.width, stream.pix_fmt = *size, "rgb8"
        for frame in pictures(3, *size):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="rgb8")))
        container.mux(stream.encode())
    done = run(model, path, tmp_path / "out")
    assert done.frames == 3
    assert len(read_clip(done.overlay)) == 3


def test_a_limit_ends_it(model, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", pictures(7, 32, 48))
    told = []
    done = run(model, clip, tmp_path / "out", limit=3, watch=lambda *numbers: told.append(numbers[:2]))
    assert done.frames == len(read_clip(done.overlay)) == 3
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_averages_apply_to_videos(tmp_path):
    bayesian = network(dropout=True)
    clip = write_clip(tmp_path / "clip.mp4", pictures(1, 32, 48))
    inference = Inference(flip=True, samples=2)
    done = run(bayesian, clip, tmp_path / "out", inference=inference)
    ((_, original),), ((_, result),) = read_clip(clip), read_clip(done.overlay)
    for averaged, close in ((inference, True), (None, False)):
        expected = blocks(Style(NAMES).blend(original, segment(bayesian, original, SIZE, averaged).labels))
        assert (np.abs(blocks(result[:32, :48]) - expected).max() < 12) == close
    with pytest.raises(ConfigError, match="no dropout"):
        run(network(), clip, tmp_path / "other", inference=inference)


def test_ctrl_c_keeps_the_frames_so_far(model, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", pictures(7, 32, 48))

    def stop(done, frames, rate):
        if done == 4:
            raise KeyboardInterrupt

    done = run(model, clip, tmp_path / "out", watch=stop)
    assert done.interrupted
    assert 4 <= done.frames == len(read_clip(done.overlay)) < 7  # some were being encoded


def test_an_error_leaves_no_file(model, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", pictures(3, 32, 48))

    def fail(done, frames, rate):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(model, clip, tmp_path / "out", watch=fail)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no video", b"\x00\x00\x00\x18ftypmp42" + bytes(100)])
def test_a_file_that_is_no_video_is_named(model, tmp_path, content):
    (tmp_path / "bad.mp4").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.mp4: .*(expected a video|holds no moving pictures|not one frame)"):
        run(model, tmp_path / "bad.mp4", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_sound_is_no_video(model, tmp_path):
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DataError, match=r"sound\.mkv: holds no moving pictures"):
        run(model, path, tmp_path / "out")


def test_a_camera_runs_until_it_is_stopped(model, tmp_path):
    """libav's test picture in place of a camera: it goes on for ever too."""
    camera = Video("camera 0", "camera0", "testsrc=size=64x48:rate=30", "lavfi")
    assert camera.path is None

    def stop(done, frames, rate):
        assert frames == 0  # not known
        if done == 3:
            raise KeyboardInterrupt

    done = predict_video(Segmenter(model, SIZE), camera, tmp_path / "camera0_overlay.mp4", Style(NAMES), watch=stop)
    assert done.interrupted
    assert 3 <= done.frames == len(read_clip(done.overlay)) <= 8


def test_a_camera_that_is_not_there_is_explained(model, tmp_path):
    camera = Video("camera 9", "camera9", "/dev/video99", "v4l2")
    with pytest.raises(DataError, match=r"camera 9: .*expected a camera at /dev/video99"):
        predict_video(Segmenter(model, SIZE), camera, tmp_path / "out.mp4", Style(NAMES))
    assert list(tmp_path.iterdir()) == []


# What a user names


def test_which_arguments_mean_videos_and_cameras(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.MP4", "b.jpg", "camera:2"):
        (tmp_path / name).touch()
    (tmp_path / "folder.mp4").mkdir()
    found = find_video("a.MP4")
    assert (found.stem, found.path.name) == ("a", "a.MP4")
    assert [find_video(name).stem for name in ("camera", "camera:0", "camera:1")] == ["camera0", "camera0", "camera1"]
    assert [find_video(name) for name in ("b.jpg", "missing.mp4", "folder.mp4", "camera:2", "camera:x")] == [None] * 5


@pytest.mark.parametrize(
    ("system", "expected"), [("linux", ("/dev/video1", "v4l2")), ("darwin", ("1", "avfoundation"))]
)
def test_cameras_are_where_the_system_has_them(monkeypatch, system, expected):
    monkeypatch.setattr("sys.platform", system)
    camera = find_video("camera:1")
    assert (camera.location, camera.format) == expected


def test_results_never_overwrite_one_another_or_a_source(tmp_path):
    (tmp_path / "other").mkdir()
    for name in ("a.mp4", "a.mkv", "b.mp4", "b_overlay.mp4"):
        (tmp_path / name).touch()
    videos = {path.name: find_video(str(path)) for path in tmp_path.iterdir() if path.is_file()}
    out = tmp_path / "out"
    both = plan_videos([videos["a.mp4"], videos["a.mkv"]], out)
    assert both == [out / "a.mp4_overlay.mp4", out / "a.mkv_overlay.mp4"]
    with pytest.raises(DataError, match="would both be written there"):
        plan_videos([videos["a.mp4"], videos["a.mp4"]], out)
    with pytest.raises(DataError, match="would overwrite this file"):
        plan_videos([videos["b.mp4"], videos["b_overlay.mp4"]], tmp_path)
    assert plan_videos([videos["a.mp4"], videos["b.mp4"]], tmp_path / "other") == [
        tmp_path / "other" / "a_overlay.mp4",
        tmp_path / "other" / "b_overlay.mp4",
    ]


# (a, b, c, d) of a display matrix: a pixel at (x, y) is shown at (a x + c y, b x + d y), y downwards.
TURNS = {
    "upright": ((1, 0, 0, 1), lambda p: p),
    "a quarter clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "half": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "a quarter anticlockwise": ((0, -1, 1, 0), lambda p: np.rot90(p)),
    "mirrored left to right": ((-1, 0, 0, 1), np.fliplr),
    "mirrored top to bottom": ((1, 0, 0, -1), np.flipud),
    "transposed": ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    "transposed the other way": ((0, -1, -1, 0), lambda p: np.rot90(p, 2).swapaxes(0, 1)),
    "a little askew": ((0.99, 0.1, -0.1, 0.99), lambda p: p),
    "nothing": ((0, 0, 0, 0), lambda p: p),
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_frame_is_shown_as_its_display_matrix_says(turn):
    (a, b, c, d), expected = TURNS[turn]
    matrix = np.round(np.array([a, b, 0, c, d, 0, 7, 9, 1 << 14]) * (1 << 16)).astype(np.int32)
    stored = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    frame = SimpleNamespace(side_data={"DISPLAYMATRIX": matrix.tobytes()}, to_ndarray=lambda format: stored)
    found = upright(frame, None)
    np.testing.assert_array_equal(found, expected(stored))
    assert found.flags.c_contiguous


@pytest.mark.parametrize(
    ("aspect", "width"), [(None, 30), (Fraction(0), 30), (Fraction(1), 30), (Fraction(4, 3), 40), (Fraction(1, 2), 15)]
)
def test_pixels_become_square(aspect, width):
    frame = SimpleNamespace(side_data={}, to_ndarray=lambda format: np.zeros((20, 30, 3), np.uint8))
    assert upright(frame, aspect).shape == (20, width, 3)


TIMES = {
    "as they should be": ([(0, 0), (1, 1), (2, 2), (5, 5)], [0, 1, 2, 5]),
    "from anywhere on": ([(900, 0), (901, 1), (903, 2)], [0, 1, 3]),
    "below 0": ([(-2, -2), (-1, -1), (0, 0)], [0, 1, 2]),
    "none": ([(None, None)] * 3, [0, 1, 2]),
    "some": ([(0, 0), (None, None), (2, 2), (None, None)], [0, 1, 2, 3]),
    "a second recording": ([(50, 0), (51, 1), (52, 2), (0, 3), (1, 4), (2, 5)], [0, 1, 2, 3, 4, 5]),
    "those of decoding": ([(1, 2), (4, 3), (3, 4), (5, 5), (2, 6)], [0, 3, 3, 4, 5]),
    "standing still": ([(0, None), (0, None), (1, None), (1, None)], [0, 0, 1, 1]),
}


@pytest.mark.parametrize("kind", TIMES)
def test_times_rise_whatever_frames_claim(kind):
    stamps, expected = TIMES[kind]
    clock = _Clock(Fraction(1, 10))
    frames = [SimpleNamespace(pts=pts, dts=dts, time_base=Fraction(1, 10)) for pts, dts in stamps]
    found = [clock(frame) for frame in frames]
    assert all(later > earlier for earlier, later in pairwise(found))
    assert [float(10 * time) for time in found] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("file", "expected"),
    [("h264_b_frames.avi", np.arange(10) / 10), ("joined.mpg", np.arange(20) / 10), ("fast.mkv", np.arange(40) / 2000)],
)
def test_films_whose_times_do_not_rise_are_written_whole(model, tmp_path, file, expected):
    done = run(model, real("cases", "video-timestamps", file), tmp_path / "out")
    times = [time for time, _ in read_clip(done.overlay)]
    assert done.frames == len(times) == len(expected)
    assert all(later > earlier for earlier, later in pairwise(times))
    assert times == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("file", "turn"), [("mirrored.mp4", np.fliplr), ("transposed.mp4", lambda p: p.swapaxes(0, 1))]
)
def test_films_are_shown_as_players_do(file, turn):
    path = real("cases", "video-mirrored", file)
    with opened_film(find_video(str(path))) as film:
        found, _ = next(film.frames())
    np.testing.assert_array_equal(found, turn(read_clip(path)[0][1]))


@pytest.mark.parametrize(
    "name", ["a:b.mp4", "http:x.mp4", "concat:y|z.mp4", "file:z.mp4", "-i.mp4", "%03d.mp4", "ä ß.mp4", "\udcff.mp4"]
)
def test_names_that_mean_something_to_ffmpeg_are_names(model, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "plain.mp4", pictures(2, 32, 48)).rename(name)
    video = find_video(name)
    (target,) = plan_videos([video], Path("out:put"))
    assert (
        predict_video(Segmenter(model, SIZE), video, target, Style(NAMES)).frames
        == len(read_clip(target.absolute()))
        == 2
    )


@pytest.mark.skipif(not hasattr(av.stream, "Disposition"), reason="this PyAV does not tell covers")
def test_a_cover_is_no_film(model, tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        cover, stream = container.add_stream("mjpeg", rate=1), container.add_stream("libx264", rate=10)
        cover.width = cover.height = 16
        cover.pix_fmt, cover.disposition = "yuvj420p", av.stream.Disposition.attached_pic
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        square = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        container.mux(cover.encode(square.reformat(format="yuvj420p")))
        container.mux(cover.encode())
        for k, picture in enumerate(pictures(3, 32, 48)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with opened_film(find_video(str(path))) as film:
        assert [picture.shape for picture, _ in film.frames()] == [(32, 48, 3)] * 3


def test_a_film_that_breaks_off_is_kept_as_far_as_it_goes(model, tmp_path):
    clip = write_clip(tmp_path / "a.mkv", pictures(60, 64, 96))
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) * 2 // 3])
    done = run(model, clip, tmp_path / "out")
    assert 0 < done.frames < 60
    assert done.frames == len(read_clip(done.overlay))


def test_damaged_packets_are_passed_over_and_counted(model, tmp_path):
    clip = write_clip(tmp_path / "a.mkv", pictures(10, 32, 48))
    packet = SimpleNamespace(decode=lambda: (_ for _ in ()).throw(av.error.InvalidDataError(1, "Invalid data")))
    with opened_film(find_video(str(clip))) as film:
        packets = list(film._container.demux(film._stream))
        some = iter([packets[0], packet, *packets[1:]])
        film._container = SimpleNamespace(demux=lambda stream: some, format=film._container.format)
        assert len(list(film.frames())) == 10
        assert film.damaged == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError("clip: breaks off: Input/output error"), "clip: breaks off: Input/output error"),
        (MemoryError(), "memory is short after 4 frames"),
    ],
)
def test_what_breaks_a_film_keeps_the_frames_before_it(model, tmp_path, monkeypatch, error, said):
    clip = write_clip(tmp_path / "clip.mp4", pictures(7, 32, 48))
    whole = Film.frames

    def broken(self):
        for number, frame in enumerate(whole(self)):
            if number == 4:
                raise error
            yield frame

    monkeypatch.setattr(Film, "frames", broken)
    done = run(model, clip, tmp_path / "out")
    assert done.frames == 4
    assert said in done.problem
    assert len(read_clip(done.overlay)) == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_is_named_and_leaves_nothing(model, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", pictures(3, 32, 48))
    video = find_video(str(clip))
    folder = tmp_path / "out"
    folder.mkdir()
    opened = av.open

    def full(path, mode="r", **options):
        return opened(open("/dev/full", "wb", buffering=0) if mode == "w" else path, mode, **options)  # noqa: PTH123

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(av, "open", full)
        with pytest.raises(DataError, match=r"clip_overlay\.mp4: could not be written: No space left.*make room"):
            predict_video(Segmenter(model, SIZE), video, folder / "clip_overlay.mp4", Style(NAMES))
    assert list(folder.iterdir()) == []
