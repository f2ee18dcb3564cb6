"Raw files over a network that fails: cut off, changed, gone, gated."
import hashlib, http.server, os, threading
from pathlib import Path

import pytest

from tulu_study.core import sources
from tulu_study.core.params import Source, SourceFile
from tulu_study.core.sources import SourceError, fetch

CONTENT = b"".join(b"row %06d of the raw file\n" % i for i in range(40_000))     # about a megabyte


@pytest.fixture
def server(project):
    "A web server that gives CONTENT, by ranges too; `server.cut` makes it hang up after so many bytes of an answer."
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self): self.answer(False)
        def do_GET(self): self.answer(True)
        def log_message(self, *a): pass

        def answer(self, body):
            if self.path == "/gone": return self.send_error(404)
            first, last = 0, len(CONTENT) - 1
            if wanted := self.headers.get("Range"):
                low, _, high = wanted.removeprefix("bytes=").partition("-")
                first, last = int(low), min(int(high or last), last)
            data = CONTENT[first:last + 1]
            self.send_response(206 if wanted else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data)))
            if wanted: self.send_header("Content-Range", f"bytes {first}-{last}/{len(CONTENT)}")
            self.end_headers()
            if body:
                self.server.asked.append(first)
                self.wfile.write(data[:self.server.cut] if self.server.cut else data)
                if self.server.cut: self.connection.close()

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.cut, made.asked = None, []
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


def record(server, path="/rows.jsonl", **file):
    return Source(key="toy", name="Toy", folder="toy", licence="none", gated=file.pop("gated", None), files=[SourceFile(name="rows.jsonl", url=f"http://127.0.0.1:{server.server_port}{path}", **file)])


def cached(project): return sorted(p.name for p in (project/"cache"/"toy").glob("[!.]*"))


def test_download_once_then_from_the_cache(server, project):
    path = fetch(record(server, sha256=hashlib.sha256(CONTENT).hexdigest()))["rows.jsonl"]
    assert path.read_bytes() == CONTENT and cached(project) == ["rows.jsonl"]
    asked = len(server.asked)
    assert fetch(record(server))["rows.jsonl"] == path and len(server.asked) == asked


def test_a_download_that_is_cut_off_says_so_and_continues(server, project):
    server.cut = 300_000
    with pytest.raises(SourceError, match="toy: rows.jsonl could not be had|bytes arrived"): fetch(record(server))
    assert "rows.jsonl" not in cached(project), "what arrived in part is no file"
    server.cut = None
    assert fetch(record(server))["rows.jsonl"].read_bytes() == CONTENT


def test_two_downloads_of_one_file_do_not_meet(server, project):
    from concurrent.futures import ThreadPoolExecutor
    good = record(server, sha256=hashlib.sha256(CONTENT).hexdigest())
    with ThreadPoolExecutor(4) as pool: paths = list(pool.map(lambda _: fetch(good)["rows.jsonl"], range(4)))
    assert all(p.read_bytes() == CONTENT for p in paths) and cached(project) == ["rows.jsonl"]


def test_part_of_a_file_is_not_asked_for_again(server, project):
    part = project/"cache"/"toy"/"rows.jsonl.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:500_000])
    assert fetch(record(server))["rows.jsonl"].read_bytes() == CONTENT
    assert min(server.asked) >= 500_000


def test_other_bytes_than_registered_are_refused_and_removed(server, project):
    with pytest.raises(SourceError, match="checksum .* expected 000000000000"): fetch(record(server, sha256="0" * 64))
    assert cached(project) == []


def test_a_damaged_cache_is_found_out(server, project):
    good = record(server, sha256=hashlib.sha256(CONTENT).hexdigest())
    path = fetch(good)["rows.jsonl"]
    path.write_bytes(CONTENT[:-5])
    with pytest.raises(SourceError, match="The file was removed"): fetch(good)
    assert fetch(good)["rows.jsonl"].read_bytes() == CONTENT


def test_gone_and_gated(server):
    with pytest.raises(SourceError) as e: fetch(record(server, "/gone", gated="accept the licence at example.org"))
    assert "accept the licence at example.org" in str(e.value) and "<sources root>/toy/rows.jsonl" in str(e.value)


def test_the_sources_root_comes_first(server, project, monkeypatch):
    root = project/"mirror"
    (root/"toy").mkdir(parents=True)
    (root/"toy"/"rows.jsonl").write_text("mine\n")
    monkeypatch.setenv("TULU_SOURCES", str(root))
    assert fetch(record(server))["rows.jsonl"].read_text() == "mine\n" and not server.asked


def test_an_empty_file_is_a_failed_copy(server, project):
    (project/"mirror"/"toy").mkdir(parents=True)
    (project/"mirror"/"toy"/"rows.jsonl").touch()
    with pytest.raises(SourceError, match="is empty"): fetch(record(server), root=project/"mirror")


def test_every_missing_file_is_named(project):
    several = Source(key="toy", name="Toy", folder="toy", licence="none", files=[SourceFile(name="a.json"), SourceFile(name="b.json"), SourceFile(name="c.json", optional=True)])
    with pytest.raises(SourceError) as e: fetch(several)
    assert "a.json" in str(e.value) and "b.json" in str(e.value) and "c.json" not in str(e.value)
    with pytest.raises(SourceError, match=str(project/"mine")): fetch(several, root=project/"mine")
    with pytest.raises(SourceError, match="has no file d.json"): fetch(several, ["d.json"])
