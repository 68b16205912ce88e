"""The download resumes, retries and verifies; tried against a server on the loopback address."""

import contextlib
import dataclasses
import errno
import hashlib
import http.server
import os
import threading

import data_fakes as fakes
import numpy as np
import pytest

from jaxcifar import data
from jaxcifar.data import download, prepare, specs
from jaxcifar.errors import UserError

BODY = np.random.default_rng(0).bytes(300_000)
ARCHIVE = specs.Archive("a.tar.gz", hashlib.md5(BODY).hexdigest(), len(BODY), "a")


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answer each request by the next entry of `server.script`; the last one stays."""

    def do_GET(self):
        server = self.server
        step = server.script.pop(0) if len(server.script) > 1 else server.script[0]
        server.ranges.append(self.headers.get("Range"))
        kind, _, value = step.partition(":")
        if kind == "status":
            return self.send_error(int(value))
        start = 0
        if self.headers.get("Range") and kind != "norange":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        body = server.body
        if kind == "other":
            body = body[:1000]
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        part = bytearray(body[start:])
        if kind == "corrupt":
            part[100] ^= 1
        if kind in ("cut", "norange") and value:  # the connection breaks after so many bytes
            part = part[: int(value)]
        with contextlib.suppress(ConnectionError):
            self.wfile.write(part)
        return None

    def log_message(self, *args):
        """Keep the test's output clean."""


@pytest.fixture
def server(monkeypatch):
    """A server of BODY; `script`: a list of ok, cut:N, norange:N, corrupt, other, status:N."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "BACKOFF_S", 0.001)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.script, server.ranges, server.body = ["ok"], [], BODY
    server.stop = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def fetch(server, tmp_path):
    """Call download.fetch on the server; return (path, lines said)."""
    def call(*script, archive=ARCHIVE):
        server.script = list(script)
        lines = []
        path = tmp_path / "downloads" / archive.file_name
        try:
            url = server.url + archive.file_name
            return download.fetch(url, archive, path, lines.append), lines
        finally:
            assert not path.exists() or path.read_bytes() == server.body
    return call


def part_of(tmp_path):
    return tmp_path / "downloads" / "a.tar.gz.part"


def test_a_whole_download(server, fetch, tmp_path):
    path, lines = fetch("ok")
    assert path.read_bytes() == BODY
    assert server.ranges == [None]
    assert "50-85 kB/s" in lines[0] and "an hour" in lines[0] and "--source PATH" in lines[0]
    assert not part_of(tmp_path).exists()
    fetch("status:500")  # there already: no request
    assert server.ranges == [None]


def test_broken_connections_continue_where_they_ended(server, fetch):
    path, lines = fetch("cut:100000", "cut:50000", "ok")
    assert path.read_bytes() == BODY
    assert server.ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert "100,000 of 300,000 bytes" in lines[1]


def test_an_interrupted_program_continues_at_the_next_start(server, fetch, tmp_path, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch("cut:70000")
    assert part_of(tmp_path).read_bytes() == BODY[:70000]
    fetch("ok")
    assert server.ranges == [None, "bytes=70000-"]


def test_a_server_that_cannot_resume_starts_over(server, fetch):
    path, _ = fetch("cut:100000", "norange:200000", "norange")
    assert path.read_bytes() == BODY
    assert server.ranges == [None, "bytes=100000-", "bytes=200000-"]


def test_passing_server_errors_are_tried_again(server, fetch):
    path, lines = fetch("status:503", "status:500", "status:429", "cut:10", "status:503", "ok")
    assert path.read_bytes() == BODY
    assert "503" in lines[1]


def test_a_stalled_connection_times_out_and_continues(server, fetch, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_S", 1.0)  # of the good request as well
    whole = server.body
    original = _Handler.do_GET

    def do_get(self):
        if len(self.server.ranges) == 0:
            self.server.ranges.append(None)
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[:65536])
            self.wfile.flush()
            self.server.stop.wait(10)
            return None
        return original(self)

    monkeypatch.setattr(_Handler, "do_GET", do_get)
    path, lines = fetch("ok")
    assert path.read_bytes() == whole
    assert "timed out" in lines[1]
    assert server.ranges == [None, "bytes=65536-"]


def test_giving_up_keeps_what_is_there(server, fetch, tmp_path):
    with pytest.raises(UserError) as caught:
        fetch("cut:1234", "cut:0")
    message = str(caught.value)
    for words in (server.url, f"{download.MAX_FAILURES} tries", "1,234 bytes are kept", "run again",
                  "--source PATH", "quickstart"):
        assert words in message
    assert "\n" not in message
    assert part_of(tmp_path).stat().st_size == 1234
    assert len(server.ranges) == 1 + download.MAX_FAILURES


def test_a_server_that_always_breaks_at_the_same_byte_is_given_up(server, fetch):
    with pytest.raises(UserError, match="brought nothing new"):
        fetch("norange:5000")
    assert len(server.ranges) == 1 + download.MAX_FAILURES


def test_no_server(monkeypatch, tmp_path, server):
    url = server.url.replace(str(server.server_port), "9")  # the discard port: nothing listens
    with pytest.raises(UserError, match="tries in a row brought nothing new"):
        download.fetch(url, ARCHIVE, tmp_path / "a.tar.gz", lambda line: None)


@pytest.mark.parametrize("status", [403, 404, 410])
def test_refusals_are_not_tried_again(server, fetch, status):
    with pytest.raises(UserError, match=rf"answers {status}.*--source PATH"):
        fetch(f"status:{status}")
    assert len(server.ranges) == 1


def test_a_file_of_another_size_is_refused_before_it_is_taken(server, fetch, tmp_path):
    with pytest.raises(UserError, match="1,000 bytes, expected 300,000"):
        fetch("other")
    assert not part_of(tmp_path).exists()


def test_a_wrong_md5_starts_over_once(server, fetch, tmp_path):
    path, lines = fetch("corrupt", "ok")
    assert path.read_bytes() == BODY
    assert "wrong md5" in lines[-1]
    path.unlink()
    server.ranges.clear()
    with pytest.raises(UserError, match="complete twice, but damaged"):
        fetch("corrupt")
    assert len(server.ranges) == 2
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_part_of_something_else_is_replaced(server, fetch, tmp_path):
    part_of(tmp_path).parent.mkdir()
    part_of(tmp_path).write_bytes(b"x" * 400_000)  # longer than the archive
    assert fetch("ok")[0].read_bytes() == BODY
    (tmp_path / "downloads" / "a.tar.gz").unlink()
    part_of(tmp_path).write_bytes(b"x" * 1000)  # continued, wrong md5, begun again
    assert fetch("ok")[0].read_bytes() == BODY


def test_disk_full_while_downloading(server, fetch, monkeypatch):
    real = open

    def full(path, mode="r", *args, **kwargs):
        if mode in ("ab", "wb"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(download, "open", full, raising=False)
    with pytest.raises(UserError, match="disk is full"):
        fetch("ok")
    assert len(server.ranges) == 1


@pytest.mark.parametrize("source", ["download", "auto"])
def test_prepare_downloads_the_official_archive(server, monkeypatch, tmp_path, source):
    spec, splits = fakes.install(monkeypatch, tmp_path)
    folder = fakes.write_python(tmp_path / "src", spec, splits)
    path, spec = fakes.write_archive(monkeypatch, tmp_path, spec, folder)
    server.body, server.script = path.read_bytes(), ["cut:20000", "ok"]
    monkeypatch.setitem(specs.SPECS, "cifar10", dataclasses.replace(spec, server=server.url))
    lines = []
    prepare.prepare("cifar10", source, tmp_path / "out", say=lines.append)
    fakes.assert_holds(data.load("cifar10", tmp_path / "out"), splits)
    assert server.ranges == [None, "bytes=20000-"]
    kept = tmp_path / "out" / "downloads" / "cifar-10-python.tar.gz"
    assert kept.read_bytes() == server.body
    assert any(server.url + "cifar-10-python.tar.gz" in line for line in lines)


def test_official_addresses():
    """The real URLs, sizes and checksums (torchvision and Keras state the same)."""
    found = {a.file_name: a.md5 for s in (specs.CIFAR10, specs.CIFAR100) for a in s.archives}
    assert found == {
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
    }
    assert specs.CIFAR10.server == specs.CIFAR100.server == "https://www.cs.toronto.edu/~kriz/"
