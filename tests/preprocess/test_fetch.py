"""`fetch` against a real HTTP server on this machine that cuts connections, ignores ranges, lies and refuses."""

import hashlib
import io
import json
import random
import re
import tarfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hpcmlip.errors import DataError
from hpcmlip.preprocess import fetch as fetching
from hpcmlip.preprocess.fetch import DATASETS, RemoteFile, fetch, fetch_file

BODY = random.Random(0).randbytes(600_000)
MD5 = "md5:" + hashlib.md5(BODY).hexdigest()


@dataclass
class Behavior:
    """What the server does; `requests` is what it was asked."""

    files: dict = field(default_factory=lambda: {"/a.h5": BODY})
    cuts: int = 0
    """Answers that end half-way."""
    ranges: bool = True
    statuses: list = field(default_factory=list)
    """Statuses of the first answers, instead of a file."""
    down_after: int = 1000
    """Answers before the server is overloaded for good."""
    requests: list = field(default_factory=list)
    """(path, Range header or None)"""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        does: Behavior = self.server.does
        does.requests.append((self.path, self.headers.get("Range")))
        if len(does.requests) > does.down_after:
            return self._answer(503, b"")
        if does.statuses:
            return self._answer(does.statuses.pop(0), b"")
        body = does.files.get(self.path)
        if body is None:
            return self._answer(404, b"")
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if does.ranges else None
        start = int(asked[1]) if asked else 0
        if asked and start >= len(body):
            return self._answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
        headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if asked else {}
        self._answer(206 if asked else 200, body[start:], headers)

    def _answer(self, status, body, headers=None):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        does: Behavior = self.server.does
        if body and does.cuts:
            does.cuts -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.does = Behavior()
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def remote(server, **changes) -> RemoteFile:
    url = f"http://127.0.0.1:{server.server_port}/a.h5"
    return RemoteFile(**({"name": "a.h5", "urls": (url,), "page": "https://example.org", "checksum": MD5} | changes))


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_file_arrives_and_is_recorded(server, tmp_path):
    fetch_file(remote(server, size=len(BODY)), tmp_path)
    assert (tmp_path / "a.h5").read_bytes() == BODY
    record = json.loads((tmp_path / "checksums.json").read_text())["a.h5"]
    assert record["sha256"] == hashlib.sha256(BODY).hexdigest() and record["size"] == len(BODY)
    assert names(tmp_path) == ["a.h5", "checksums.json"]


def test_a_cut_connection_is_resumed_by_asking_for_the_rest(server, tmp_path):
    server.does.cuts = 2
    fetch_file(remote(server), tmp_path, pause=0)
    assert (tmp_path / "a.h5").read_bytes() == BODY
    starts = [int(asked[6:-1]) if asked else 0 for _, asked in server.does.requests]
    # half of the whole, then half of the rest, kept in whole blocks of 64 KiB
    assert len(starts) == 3 and starts[0] == 0 and 200_000 < starts[1] <= 300_000 < starts[2] <= 450_000


def test_the_next_command_goes_on_where_the_last_one_failed(server, tmp_path):
    part = tmp_path / ".partial" / "a.h5.part"
    part.parent.mkdir()
    part.write_bytes(BODY[:250_000])
    fetch_file(remote(server), tmp_path)
    assert server.does.requests[0] == ("/a.h5", "bytes=250000-")
    assert (tmp_path / "a.h5").read_bytes() == BODY


def test_what_arrived_is_kept_when_the_tries_run_out(server, tmp_path):
    server.does.cuts, server.does.down_after = 1, 1
    with pytest.raises(DataError, match=r"503.*bytes are kept in .*a\.h5\.part.*run the same command again"):
        fetch_file(remote(server), tmp_path, pause=0)
    assert names(tmp_path) == [".partial/a.h5.part"]
    kept = (tmp_path / ".partial" / "a.h5.part").read_bytes()
    assert len(kept) > 200_000 and BODY.startswith(kept)


def test_a_whole_part_needs_no_byte_more(server, tmp_path):
    part = tmp_path / ".partial" / "a.h5.part"
    part.parent.mkdir()
    part.write_bytes(BODY)
    fetch_file(remote(server), tmp_path)
    assert server.does.requests == [("/a.h5", f"bytes={len(BODY)}-")]
    assert (tmp_path / "a.h5").read_bytes() == BODY


def test_a_server_that_ignores_ranges_starts_over(server, tmp_path):
    server.does.ranges = False
    part = tmp_path / ".partial" / "a.h5.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 100)
    fetch_file(remote(server), tmp_path)
    assert (tmp_path / "a.h5").read_bytes() == BODY


def test_a_wrong_checksum_is_refused_and_leaves_nothing(server, tmp_path):
    server.does.files["/a.h5"] = BODY[:-1] + b"!"
    with pytest.raises(DataError, match="published checksum md5:"):
        fetch_file(remote(server), tmp_path, pause=0)
    assert names(tmp_path) == []


def test_a_wrong_size_is_refused_before_the_download(server, tmp_path):
    with pytest.raises(DataError, match=f"offers {len(BODY)} bytes, the file has 7"):
        fetch_file(remote(server, size=7), tmp_path, pause=0)


def test_the_second_address_serves_when_the_first_refuses(server, tmp_path):
    urls = tuple(f"http://127.0.0.1:{server.server_port}/{name}" for name in ("gone.h5", "a.h5"))
    fetch_file(remote(server, urls=urls), tmp_path, pause=0)
    assert (tmp_path / "a.h5").read_bytes() == BODY


@pytest.mark.parametrize("status", [202, 403, 404])
def test_a_refusal_says_where_to_get_the_file_by_hand(server, tmp_path, status):
    server.does.statuses = [status]
    with pytest.raises(DataError, match=rf"the server answered {status}.*by hand from https://example\.org"):
        fetch_file(remote(server), tmp_path, pause=0)
    assert not (tmp_path / "a.h5").exists()


def test_no_server_at_all(server, tmp_path):
    port = server.server_port
    server.server_close()
    with pytest.raises(DataError, match=r"connection failed.*refused.*run the same command again"):
        fetch_file(remote(server, urls=(f"http://127.0.0.1:{port}/a.h5",)), tmp_path, pause=0)


def test_a_file_that_is_there_is_checked_not_fetched(server, tmp_path):
    fetch_file(remote(server), tmp_path)
    server.does.requests.clear()
    fetch_file(remote(server), tmp_path)
    assert server.does.requests == []
    (tmp_path / "a.h5").write_bytes(BODY[:-1] + b"!")
    with pytest.raises(DataError, match=r"does not have the checksum md5:.*move it away"):
        fetch_file(remote(server), tmp_path)


def test_without_a_published_sum_the_first_download_is_the_reference(server, tmp_path):
    fetch_file(remote(server, checksum=None), tmp_path)
    (tmp_path / "a.h5").write_bytes(BODY[:-1] + b"!")
    with pytest.raises(DataError, match="does not have the checksum sha256:"):
        fetch_file(remote(server, checksum=None), tmp_path)


def archive(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return out.getvalue()


def test_an_archive_gives_its_members_and_nothing_else(server, tmp_path):
    to = tmp_path / "raw"
    to.mkdir()
    server.does.files["/a.tar.gz"] = archive({"release/s1.h5": BODY, "release/s2.h5": b"2", "../evil.h5": b"evil"})
    url = f"http://127.0.0.1:{server.server_port}/a.tar.gz"
    file = remote(server, name="a.tar.gz", urls=(url,), checksum=None, members=("s1.h5", "s2.h5"))
    fetch_file(file, to)
    assert (to / "s1.h5").read_bytes() == BODY and (to / "s2.h5").read_bytes() == b"2"
    assert names(tmp_path) == ["raw/checksums.json", "raw/s1.h5", "raw/s2.h5"]
    server.does.requests.clear()
    fetch_file(file, to)
    assert server.does.requests == []


def test_an_archive_without_a_wanted_member_is_an_error(server, tmp_path):
    server.does.files["/a.tar.gz"] = archive({"release/s1.h5": BODY})
    url = f"http://127.0.0.1:{server.server_port}/a.tar.gz"
    file = remote(server, name="a.tar.gz", urls=(url,), checksum=None, members=("s1.h5", "s2.h5"))
    with pytest.raises(DataError, match=r"lacks s2\.h5"):
        fetch_file(file, tmp_path)


def test_a_damaged_archive_is_removed(server, tmp_path):
    server.does.files["/a.tar.gz"] = archive({"release/s1.h5": BODY})[:-5000]
    url = f"http://127.0.0.1:{server.server_port}/a.tar.gz"
    file = remote(server, name="a.tar.gz", urls=(url,), checksum=None, members=("s1.h5",))
    with pytest.raises(DataError, match="no whole tar archive"):
        fetch_file(file, tmp_path)
    assert not list(tmp_path.rglob("*.tar.gz")) and not (tmp_path / "s1.h5").exists()


def test_fetch_of_a_whole_data_set(server, tmp_path, monkeypatch, capsys):
    server.does.files["/b.h5"] = b"b"
    two = (
        remote(server),
        remote(server, name="b.h5", urls=(remote(server).urls[0].replace("a.h5", "b.h5"),), checksum=None),
    )
    monkeypatch.setitem(fetching.DATASETS, "ani-1x", two)
    fetch("ani-1x", tmp_path / "new" / "raw")
    assert names(tmp_path) == [f"new/raw/{name}" for name in ("a.h5", "b.h5", "checksums.json")]
    assert "2 files" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*file"):
        fetch("ani-1x", tmp_path / "file")


def test_the_command_without_network_ends_with_one_sentence(cli, tmp_path):
    nowhere = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = cli("fetch", "comp6", "--to", tmp_path, expect=1, env=nowhere)
    assert done.stderr.splitlines()[-1].startswith("hpcmlip: cannot fetch ani_md_bench.h5")
    assert "Traceback" not in done.output and "run the same command again" in done.stderr
    assert not list(tmp_path.rglob("*.h5"))


def test_the_public_data_sets():
    """Names as published: ANI-1 has a file for each number of heavy atoms, COMP6 has six parts in eleven files."""
    assert [name for file in DATASETS["ani-1"] for name in file.products] == [f"ani_gdb_s0{i}.h5" for i in range(1, 9)]
    assert len(DATASETS["comp6"]) == 11
    for files in DATASETS.values():
        for file in files:
            assert all(url.startswith("https://") for url in file.urls)
            assert file.checksum is None or re.fullmatch(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", file.checksum)


def test_an_unfinished_download_of_another_data_set_stays(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "comp6", ())
    other = tmp_path / fetching.PARTIAL / "ani1x-release.h5.part"
    other.parent.mkdir()
    other.write_bytes(b"half")
    fetch("comp6", tmp_path)
    assert other.read_bytes() == b"half"
