"""Downloads against a server on this machine: resuming, mirrors, broken connections, wrong files."""

import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest
from support.local_server import Behaviour

from segnet_scratch.data.download import fetch as fetch_module
from segnet_scratch.data.download.fetch import fetch
from segnet_scratch.errors import DataError
from segnet_scratch.files import lock

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


@pytest.fixture
def server(server):
    """The server, whose paths hold CONTENT unless told otherwise."""
    url = server.url
    server.url = lambda path, **behaviour: url(path, **{"content": CONTENT, **behaviour})
    return server


@pytest.fixture
def get(tmp_path, monkeypatch):
    """`get(url, ...)` fetches into a folder and returns the file."""
    monkeypatch.setattr(fetch_module, "_PAUSE", 0.0)
    monkeypatch.setattr(fetch_module, "_TIMEOUT", 5.0)

    def run(*urls, target="archive.tar", **options):
        target = tmp_path / "folder" / target
        fetch(urls, target, MD5, len(CONTENT), **options)
        return target

    return run


def part(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "archive.tar.part"


def leave_part(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "folder").mkdir()
    part(tmp_path).write_bytes(content)


def test_a_file_is_fetched_and_progress_told(server, get, tmp_path):
    told = []
    target = get(server.url("a"), progress=lambda *state: told.append(state))
    assert target.read_bytes() == CONTENT
    assert not part(tmp_path).exists()
    assert [what for what, _, _ in told] == sorted((what for what, _, _ in told), reverse=True) != []
    assert [state for state in told if state[1] == len(CONTENT)] == [
        ("download", len(CONTENT), len(CONTENT)),
        ("check", len(CONTENT), len(CONTENT)),
    ]
    assert server.requests == [("a", None)]


def test_what_is_there_is_not_fetched_again(server, get):
    url = server.url("a")
    get(url)
    get(url)
    assert len(server.requests) == 1


def test_another_file_of_that_name_is_left_alone(server, get, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/archive.tar").write_bytes(bytes(len(CONTENT)))
    with pytest.raises(DataError, match=r"another file than expected.*move it away"):
        get(server.url("a"))
    assert (tmp_path / "folder/archive.tar").read_bytes() == bytes(len(CONTENT))
    assert server.requests == []


def test_what_another_program_broke_off_is_gone_on_with(server, get, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/archive.tar").write_bytes(CONTENT[:1000])
    assert get(server.url("a")).read_bytes() == CONTENT
    assert server.requests == [("a", "bytes=1000-")]


@pytest.mark.parametrize(
    ("left", "behaviour", "requests"),
    [
        (CONTENT[:100_000], {}, ["bytes=100000-"]),
        (CONTENT[:1000], {"total": "*"}, ["bytes=1000-"]),
        (CONTENT, {}, []),
        (CONTENT + b"x", {}, [None]),
        (bytes(1000), {}, ["bytes=1000-", None]),
        (bytes(100_000), {"ranges": False}, ["bytes=100000-"]),
    ],
    ids=["gone on with", "unknown total", "only verified", "too long", "damaged", "server without ranges"],
)
def test_what_becomes_of_a_part(server, get, tmp_path, left, behaviour, requests):
    leave_part(tmp_path, left)
    assert get(server.url("a", **behaviour)).read_bytes() == CONTENT
    assert server.requests == [("a", asked) for asked in requests]


@pytest.mark.parametrize("size", [True, False])
def test_broken_connections_are_resumed(server, get, size):
    url = server.url("a", cuts=[100_000, 1, 150_000], size=size)
    assert get(url).read_bytes() == CONTENT
    assert server.requests == [("a", None), ("a", "bytes=100000-"), ("a", "bytes=100001-"), ("a", "bytes=250001-")]


@pytest.mark.parametrize("lie", [{"shift": 7}, {"total": "999"}, {"total": "nonsense"}])
def test_a_wrong_range_is_not_trusted(server, get, tmp_path, lie):
    leave_part(tmp_path, CONTENT[:1000])
    assert get(server.url("a", **lie), server.url("b")).read_bytes() == CONTENT
    assert server.requests == [("a", "bytes=1000-"), ("b", None)]


def test_a_range_beyond_the_end_starts_over(server, get, tmp_path):
    leave_part(tmp_path, CONTENT[:200_000])
    short = server.url("short", content=CONTENT[:150_000])
    with pytest.raises(DataError, match=r"150,000 bytes, expected 300,000"):
        get(short)
    assert server.requests == [("short", "bytes=200000-"), ("short", None)]
    assert get(short, server.url("b")).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [404, 403, 410])
def test_the_next_mirror_follows_at_once(server, get, status):
    assert get(server.url("a", status=[status] * 9), server.url("b")).read_bytes() == CONTENT
    assert [path for path, _ in server.requests] == ["a", "b"]


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_busy_server_is_asked_again(server, get, status):
    assert get(server.url("a", status=[status, status])).read_bytes() == CONTENT
    assert len(server.requests) == 3
    with pytest.raises(DataError, match=f"HTTP {status}"):
        get(server.url("b", status=[status] * 9), target="other")
    assert len(server.requests) == 6


def test_a_server_that_is_not_there(server, get):
    with pytest.raises(DataError) as caught:
        get("http://127.0.0.1:9/a", "ftp://127.0.0.1/a", "file:///etc/passwd", "data:,x", "nonsense", "http://[broken")
    text = str(caught.value)
    assert "none of 6 mirrors" in text
    assert text.count("cannot be") >= 5
    assert "--mirror" in text
    assert get("http://127.0.0.1:9/a", server.url("b")).read_bytes() == CONTENT


def test_redirects_are_followed_but_not_out_of_http(server, get, tmp_path):
    goal = server.url("b")
    leave_part(tmp_path, CONTENT[:1000])
    assert get(server.url("a", status=[302], location=goal)).read_bytes() == CONTENT
    assert server.requests == [("a", "bytes=1000-"), ("b", "bytes=1000-")]


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "self"])
def test_redirects_that_lead_nowhere(server, get, location):
    url = server.url("a", status=[302] * 99, location=location)
    server.paths["a"].location = url if location == "self" else location
    with pytest.raises(DataError, match=r"HTTP 302|unknown url type"):
        get(url)


@pytest.mark.parametrize("size", [True, False])
def test_another_file_is_refused(server, get, tmp_path, size):
    page = b"<html>moved</html>"
    larger = server.url("larger", content=CONTENT + b"x", size=size)
    with pytest.raises(DataError) as caught:
        get(server.url("page", content=page, size=size), larger)
    reasons = ("another file (18 bytes", "another file (300,001 bytes") if size else ("after 18 of", "not bytes 18-")
    assert all(reason in str(caught.value) for reason in reasons)
    assert not (tmp_path / "folder/archive.tar").exists()
    assert part(tmp_path).stat().st_size <= len(page)
    if not size:
        with pytest.raises(DataError, match="more than 300,000 bytes"):
            get(larger, target="other")
    assert get(server.url("b")).read_bytes() == CONTENT  # also behind what the page left


def test_a_wrong_hash_is_thrown_away(server, get, tmp_path):
    wrong = bytes(len(CONTENT))
    with pytest.raises(DataError, match=f"another file.*expected {MD5}"):
        get(server.url("a", content=wrong))
    assert not (tmp_path / "folder/archive.tar").exists()
    assert part(tmp_path).stat().st_size == 0
    assert get(server.url("a", content=wrong), server.url("b")).read_bytes() == CONTENT


def test_a_part_goes_on_at_another_mirror(server, get):
    dead = server.url("a", cuts=[120_000, 0, 0, 0])
    assert get(dead, server.url("b")).read_bytes() == CONTENT
    assert server.requests[-1] == ("b", "bytes=120000-")
    assert [path for path, _ in server.requests] == ["a", "a", "a", "a", "b"]


def test_what_was_fetched_is_kept_where_all_fail(server, get, tmp_path):
    with pytest.raises(DataError, match="120,000 of 300,000 bytes are kept"):
        get(server.url("a", cuts=[120_000, 0, 0, 0]))
    assert part(tmp_path).read_bytes() == CONTENT[:120_000]


def test_a_server_that_drips_is_given_up(server, get, monkeypatch):
    monkeypatch.setattr(fetch_module, "_TRIES", 5)
    with pytest.raises(DataError, match="broke off 5 times"):
        get(server.url("a", cuts=[1] * 99))
    assert len(server.requests) == 5


def test_a_silent_server_times_out(server, get, monkeypatch):
    monkeypatch.setattr(fetch_module, "_TIMEOUT", 0.1)
    stop = threading.Event()

    class Stalling(Behaviour):
        @property
        def status(self):
            stop.wait(5)
            return [404]

        @status.setter
        def status(self, _):
            pass

    server.paths["a"] = Stalling()
    try:
        url = f"http://127.0.0.1:{server.server.server_port}/a"
        assert get(url, server.url("b")).read_bytes() == CONTENT
    finally:
        stop.set()


def test_a_full_disk_keeps_what_is_there(server, get, monkeypatch, tmp_path):
    leave_part(tmp_path, CONTENT[:1000])

    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"archive\.tar\.part: No space left.*make room.*run it again"):
        get(server.url("a"), progress=full)
    assert CONTENT.startswith(part(tmp_path).read_bytes())
    assert get(server.url("a")).read_bytes() == CONTENT


def test_two_processes_do_not_write_one_file(server, get, tmp_path):
    leave_part(tmp_path, b"")
    with part(tmp_path).open("rb") as other:
        assert lock(other.fileno(), part(tmp_path))
        with pytest.raises(DataError, match="another process"):
            get(server.url("a"))


def test_an_interruption_keeps_what_is_there(server, get, tmp_path):
    def stop(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(server.url("a"), progress=stop)
    assert get(server.url("a")).read_bytes() == CONTENT
