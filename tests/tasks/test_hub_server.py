"""The hub itself, as far as this package speaks with it: a small one on the loopback, in a process of its own with HF_ENDPOINT.

What is tested is the way through huggingface_hub: names, commits, gates, and answers that stop in the middle.
"""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import pytest

COMMIT = "c0ffee" + "0" * 34
DOCUMENTS = [f"document number {i} of the small hub" for i in range(90)]
PAGE = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: data/test-*.parquet\n---\n"
CALLER = """
import json, sys
import datasets
from sepcap.tasks.sources.hub import HubSource
from sepcap.tasks.sources.hub_rows import HubRow

datasets.config.STREAMING_READ_RETRY_INTERVAL = 0  # 5 seconds of sleep

def read(row):
    try:
        source = HubSource(row)
        rows = {split: [i for part in source.slices(split) for i in part["row"]] for split in ("collect", "evaluate")}
        return {"commit": source.commit, "fingerprint": source.fingerprint, **rows}
    except Exception as error:
        return {"error": type(error).__name__, "says": str(error)}

rows = {
    "open": HubRow("owner/open", split="test"),
    "by files": HubRow("owner/open", split="test", files="data/test-*.parquet"),
    "breaks": HubRow("owner/breaks", split="test"),
    "gated": HubRow("owner/gated", split="test", gate="a form"),
    "gated by files": HubRow("owner/gated", split="test", files="data/test-*.parquet"),
    "missing": HubRow("owner/missing"),
}
print(json.dumps({name: read(row) for name, row in rows.items() if name in sys.argv[1:]}))
"""


class Hub(BaseHTTPRequestHandler):
    """Answers what `datasets` asks for a dataset: its page, its commit, the list of its files, and parts of them."""

    root: Path
    asked: list
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", length=None, **headers):
        self.send_response(status)
        for name, value in {"X_Repo_Commit": COMMIT, "Content_Length": length or len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def entry(self, repository, path):
        file = self.root / repository / path
        return {"type": "file" if file.is_file() else "directory", "oid": "0" * 40, "size": file.stat().st_size, "path": str(path)}

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        repository = re.match(r"/api/datasets/([^/]+/[^/]+)/", self.path)[1]
        self.answer(200, json.dumps([self.entry(repository, p) for p in paths if (self.root / repository / p).exists()]).encode())

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        self.asked.append(path)
        if "owner/missing" in path:
            self.answer(404, X_Error_Code="RepoNotFound")
        elif found := re.match(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.*)", path):
            self.send_file(found[1], found[2])
        elif found := re.match(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            folder = self.root / found[1] / found[2]
            entries = [self.entry(found[1], p.relative_to(self.root / found[1])) for p in sorted(folder.iterdir())]
            self.answer(200, json.dumps(entries).encode())
        elif found := re.match(r"/api/datasets/([^/]+/[^/]+)", path):
            self.answer(200, json.dumps({"id": found[1], "sha": COMMIT, "siblings": [], "private": False, "tags": []}).encode())
        else:
            self.answer(200 if path.startswith("/datasets/") else 404)

    def send_file(self, repository, path):
        file = self.root / repository / path
        if not file.is_file():
            self.answer(404, X_Error_Code="EntryNotFound")
        elif repository == "owner/gated" and file.suffix != ".md":
            self.answer(403, X_Error_Code="GatedRepo")
        elif part := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            data = file.read_bytes()
            first, last = int(part[1]), min(int(part[2]), file.stat().st_size - 1)
            body = data[first : last + 1]
            breaks = repository == "owner/breaks" and file.stem == "test-1" and sum(file.name in p for p in self.asked) == 1
            self.answer(206, body[:50] if breaks else body, len(body), ETag=f'"{path}"', Content_Range=f"bytes {first}-{last}/{len(data)}")
            self.close_connection = self.close_connection or breaks
        else:
            body = file.read_bytes()
            self.answer(200, body if self.command == "GET" else b"", len(body), ETag=f'"{path}"')


def ask(server, home, *names, offline="0"):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home), "HF_HUB_OFFLINE": offline}
    done = subprocess.run([sys.executable, "-c", CALLER, *names], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.thorough
def test_the_way_through_the_hub(tmp_path):
    from datasets import Dataset

    for repository in ("open", "breaks", "gated"):
        folder = tmp_path / "owner" / repository
        for shard in range(3):
            Dataset.from_dict({"text": DOCUMENTS[shard * 30 : shard * 30 + 30]}).to_parquet(folder / "data" / f"test-{shard}.parquet")
        (folder / "README.md").write_text(PAGE)
    handler = type("Handler", (Hub,), {"root": tmp_path, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found = ask(server, tmp_path / "home", "open", "by files", "breaks", "gated", "gated by files", "missing")
        before = len(handler.asked)
        again = ask(server, tmp_path / "home", "open", offline="1")
    finally:
        server.shutdown()
    for name in ("open", "by files", "breaks"):
        assert found[name]["commit"] == COMMIT
        assert sorted(found[name]["collect"] + found[name]["evaluate"]) == list(range(90))
        assert found[name]["collect"] == found["open"]["collect"]
    for name in ("gated", "gated by files"):
        assert found[name]["error"] == "PermissionError", found[name]
        for step in (f"127.0.0.1:{server.server_port}/datasets/owner/gated", "accept its terms", "hf auth login"):
            assert step in found[name]["says"]
    assert "(a form)" in found["gated"]["says"]
    assert found["missing"]["error"] == "DatasetNotFoundError"
    assert "owner/missing" in found["missing"]["says"]
    # the whole of it again, from the cache alone
    assert again["open"] == found["open"]
    assert len(handler.asked) == before
