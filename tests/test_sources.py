"Raw files over a network that fails: cut off, changed, gone, gated."
import hashlib, http.server, os, threading
from pathlib import Path

import pytest

from tulu_study.core import sources
from tulu_study.core.params import Source, SourceFile, datasets
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
            if self.path == "/members": return self.send_error(401)
            if self.path.startswith("/datasets/gated/"):   # as the hub answers somebody who has not accepted a repository's terms
                self.send_response(self.server.refusal)
                for name, value in {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to dataset gated/set is restricted.", "Content-Length": "0"}.items(): self.send_header(name, value)
                return self.end_headers()
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
    made.cut, made.asked, made.refusal = None, [], 401
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


@pytest.mark.parametrize("refusal", [401, 403])
@pytest.mark.parametrize("gated", [None, "ask the publisher"])
def test_a_licence_that_needs_acceptance(server, project, monkeypatch, refusal, gated):
    "The hub's own client asks a server that answers as the hub does; the record may know of the licence, or not."
    from huggingface_hub import constants
    address, server.refusal = f"http://127.0.0.1:{server.server_port}", refusal
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(project/"hub"))
    with pytest.raises(SourceError) as e: fetch(Source(key="toy", name="Toy", folder="toy", licence="none", gated=gated, files=[SourceFile(name="rows.jsonl", hub="datasets/gated/set", revision="0" * 40)]))
    assert "GatedRepoError" in str(e.value) and f"it answered {refusal}" in str(e.value) and "https://huggingface.co/datasets/gated/set" in str(e.value) and "accept the terms" in str(e.value) and "hf auth login" in str(e.value)
    assert ("ask the publisher" in str(e.value)) == bool(gated) and "<sources root>/toy/rows.jsonl" in str(e.value)
    assert cached(project) == []


def test_a_server_that_wants_a_login(server, project):
    with pytest.raises(SourceError) as e: fetch(record(server, "/members"))
    assert f":{server.server_port}/members gives nothing to somebody unknown (it answered 401)" in str(e.value) and "by hand" in str(e.value) and cached(project) == []
    with pytest.raises(SourceError) as e: fetch(record(server, "/gone"))
    assert "somebody unknown" not in str(e.value)


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


# Several places of one file, pins, archives

def places(server, first, *others, **file):
    "A file whose first place is `first` and whose alternatives are `others`, paths on the server or hub repositories."
    def at(path): return {"url": f"http://127.0.0.1:{server.server_port}{path}"} if path.startswith("/") else {"hub": path}
    return Source(key="toy", name="Toy", folder="toy", licence="none", files=[SourceFile(name="rows.jsonl", **at(first), alternatives=[{"note": "write it yourself"}, *map(at, others)], **file)])


def test_the_second_place_is_asked_when_the_first_is_gone(server, project):
    assert fetch(places(server, "/gone", "/rows.jsonl", sha256=hashlib.sha256(CONTENT).hexdigest(), size=len(CONTENT)))["rows.jsonl"].read_bytes() == CONTENT
    assert cached(project) == ["rows.jsonl"]


def test_every_place_that_failed_is_named_with_the_advice(server, project):
    with pytest.raises(SourceError) as e: fetch(places(server, "/gone", "/gone?too", size=5))
    assert "404" in str(e.value) or "gone" in str(e.value)
    assert f":{server.server_port}/gone, then at http" in str(e.value) and "Otherwise: write it yourself." in str(e.value) and "<sources root>/toy/rows.jsonl" in str(e.value)


def test_an_alternative_is_held_to_the_same_size_and_checksum(server, project):
    with pytest.raises(SourceError, match=f"{len(CONTENT):,} bytes, expected 5"): fetch(places(server, "/rows.jsonl", "/again", size=5))
    assert cached(project) == []


def test_what_one_place_began_another_does_not_finish(server, project):
    part = project/"cache"/"toy"/"rows.jsonl.part"
    part.parent.mkdir(parents=True)
    def spoil(*a):
        part.write_bytes(b"<html>not found</html>")
        raise OSError("gone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_from_hub", spoil)
        assert fetch(places(server, "datasets/a/b", "/rows.jsonl"))["rows.jsonl"].read_bytes() == CONTENT


def test_a_hub_file_is_had_at_its_pinned_revision_and_path(project, monkeypatch):
    import huggingface_hub
    asked, there = [], project/"blob"
    there.write_bytes(b"{}\n")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or str(there))
    one = Source(key="toy", name="Toy", folder="toy", licence="none", files=[SourceFile(name="local.jsonl", hub="datasets/own/er", path="deep/far.jsonl", revision="abc123", sha256=hashlib.sha256(b"{}\n").hexdigest())])
    assert fetch(one)["local.jsonl"].read_bytes() == b"{}\n"
    assert asked == [(("own/er", "deep/far.jsonl"), {"repo_type": "dataset", "revision": "abc123"})]


def test_members_of_zip_and_tar_archives_and_packed_files(project):
    import gzip, io, tarfile, zipfile
    with zipfile.ZipFile(project/"a.zip", "w", zipfile.ZIP_DEFLATED) as archive: archive.writestr("core.json", '[{"a": 1}]')
    with tarfile.open(project/"b.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("repo/other.txt")
        info.size = 2
        archive.addfile(info, io.BytesIO(b"[]"))
    (project/"c.json.gz").write_bytes(gzip.compress(b"[]"))
    files = [SourceFile(name="core.json", url=f"zip://core.json::file://{project}/a.zip", size=10, sha256=hashlib.sha256(b'[{"a": 1}]').hexdigest()),
             SourceFile(name="c.json.gz", url=f"file://{project}/c.json.gz"), SourceFile(name="other.txt", url=f"file://{project}/b.tar.gz!repo/other.txt")]
    got = fetch(Source(key="toy", name="Toy", folder="toy", licence="none", files=files))
    assert got["core.json"].read_text() == '[{"a": 1}]' and gzip.decompress(got["c.json.gz"].read_bytes()) == b"[]" and got["other.txt"].read_bytes() == b"[]"
    none = Source(key="toy", name="Toy", folder="none", licence="none", files=[SourceFile(name="gone.txt", url=f"file://{project}/b.tar.gz!repo/gone.txt")])
    with pytest.raises(SourceError, match="has no member 'repo/gone.txt'"): fetch(none)


def test_a_damaged_zip_is_an_error_with_advice(project):
    (project/"a.zip").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(SourceError, match="core.json could not be had"):
        fetch(Source(key="toy", name="Toy", folder="toy", licence="none", files=[SourceFile(name="core.json", url=f"zip://core.json::file://{project}/a.zip")]))


def test_where_files_are_is_said_without_downloading(server, project):
    (project/"mirror"/"toy").mkdir(parents=True)
    (project/"mirror"/"toy"/"one.json").write_text("[]")
    files = [SourceFile(name="one.json"), SourceFile(name="far.json", hub="datasets/a/b", revision="0123456789abcdef", alternatives=[{"note": "ask her"}]), SourceFile(name="none.json")]
    rows = {row["file"]: row for row in sources.acquisition(Source(key="toy", name="Toy", folder="toy", licence="none", files=files), root=project/"mirror")}
    assert [row["state"] for row in rows.values()] == ["in the sources root", "to be downloaded", "not here"]
    assert rows["far.json"]["place"] == "datasets/a/b/far.json on the hub, at 0123456789ab" and rows["far.json"]["pinned"] == "revision" and rows["far.json"]["alternatives"] == ["ask her"]
    assert not server.asked


def test_every_dataset_of_the_paper_has_a_place_for_each_file():
    for record in datasets().values():
        assert record.files and record.licence and record.homepage, record.key
        for row in sources.acquisition(record, root="/nowhere"): assert row["place"] != "no download is known", (record.key, row["file"])
        assert all(len(f.revision) == 40 for f in record.files if f.revision), f"{record.key}: a commit is pinned by its 40 digits"


@pytest.mark.parametrize("bad, said", [({"url": "https://a", "hub": "b/c"}, "expected one of them"), ({"url": "https://a", "revision": "main"}, "there is no hub"), ({"path": "x"}, "there is no hub"),
                                       ({"alternatives": [{}]}, "needs a url"), ({"size": 0}, "greater than 0"), ({"sha256": "abc"}, "pattern"), ({"alternatives": [{"sha256": "0" * 64}]}, "not permitted")])
def test_impossible_records_of_files_are_refused(bad, said):
    with pytest.raises(ValueError, match=said): SourceFile(name="rows.jsonl", **bad)
