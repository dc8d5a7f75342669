"""`jaxmllm data fetch` against a local stand-in of the hub: the command in a child process, cut off and called again."""

import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxmllm.data import fetch
from jaxmllm.data.sources import open_source
from jaxmllm.errors import InputError

COMMIT = "a" * 40


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def table(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


class Hub(http.server.BaseHTTPRequestHandler):
    """What the client asks of the hub: a repository's files, one file's size and sum, its bytes."""

    files: dict[str, dict[str, bytes]] = {}  # by repository
    pictures: dict[str, bytes] = {}
    broken = ""  # the connection breaks in the middle of a file of such a name
    asked: list[str] = []

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if path.startswith("/pictures/"):
            return self.send(self.pictures.get(path.rpartition("/")[2]))
        if api := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/(revision|tree)/[^/]+", path):
            names = self.files.get(api[1])
            if names is None:
                return self.send(None)
            listed = [{"type": "file", "path": n, "oid": "0" * 40, "size": len(names[n])} for n in names]
            info = {"id": api[1], "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            return self.send(json.dumps(info if api[2] == "revision" else listed).encode())
        if one := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.send(self.files.get(one[1], {}).get(one[2]), file=True)
        return self.send(None)

    def send(self, content: bytes | None, file: bool = False):
        if content is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(re.findall(r"bytes=(\d+)-", self.headers.get("Range", ""))[0]) if self.headers.get("Range") else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if file:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            whole = not (file and Hub.broken and Hub.broken in self.path)
            self.wfile.write(content[start:] if whole else content[start : start + len(content) // 2])
            if not whole:
                self.close_connection = True


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "pictures", {})
    monkeypatch.setattr(Hub, "broken", "")
    monkeypatch.setattr(Hub, "asked", [])
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def call(hub: str, folder: Path, name: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(folder / "hf"), "PYTHONPATH": os.pathsep.join(sys.path)}
    env |= {
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "HF_HUB_ETAG_TIMEOUT": "2",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "jaxmllm.cli", "data", "fetch", name]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def test_grounding_cut_off_and_called_again(hub, tmp_path, monkeypatch):
    rows = [
        {"image": {"bytes": picture(k), "path": None}, "problem": "the dog", "solution": [1.0, 2.0, 30.0, 35.0]}
        for k in range(3)
    ]
    shards = {f"data/train-0000{k}-of-00002.parquet": table(rows[: 2 - k]) for k in range(2)}
    Hub.files = {"Kangheng/PR1-Datasets-Grounding": {**shards, "README.md": b"not asked for"}}
    Hub.broken = "00001-of"
    cut = call(hub, tmp_path, "pr1:grounding")
    assert cut.returncode == 2 and "the same command goes on" in cut.stderr, cut.stderr
    Hub.broken = ""
    Hub.asked.clear()
    ran = call(hub, tmp_path, "pr1:grounding")
    assert ran.returncode == 0, ran.stderr
    got = [line for line in Hub.asked if line.startswith("GET /datasets")]
    assert len(got) == 1 and "00001-of" in got[0]  # what was whole does not come again
    assert not any("README" in line for line in Hub.asked)
    source = ran.stdout.split()[-1]
    monkeypatch.chdir(tmp_path)
    found = open_source(source)
    assert (len(found), found[0]["expression"]) == (3, "the dog")
    Hub.asked.clear()
    assert call(hub, tmp_path, "pr1:grounding").returncode == 0
    assert not any(line.startswith("GET /datasets") for line in Hub.asked)  # nothing comes twice


def test_pixmo_with_its_pictures(hub, tmp_path, monkeypatch):
    good, other = picture(1), picture(2)
    sums = [hashlib.sha256(content).hexdigest() for content in (good, other, b"gone")]
    Hub.pictures = {"good.png": good, "changed.png": b"not what was annotated"}
    names = ("good.png", "changed.png", "gone.png")
    rows = [
        {
            "image_url": f"{hub}/pictures/{n}",
            "image_sha256": s,
            "count": 1,
            "points": [{"x": 3.0, "y": 4.0}],
            "label": "cup",
        }
        for n, s in zip(names, sums, strict=True)
    ]
    rows.append({**rows[0], "image_sha256": "../../outside"})
    Hub.files = {"allenai/pixmo-count": {"data/validation-00000-of-00001.parquet": table(rows)}}
    ran = call(hub, tmp_path, "pixmo")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == "pixmo:data/pixmo_count/validation.parquet?images=data/pixmo_count/images"
    monkeypatch.chdir(tmp_path)
    (record,) = open_source(ran.stdout.split()[-1])
    assert (record["label"], record["count"], record["points"]) == ("cup", 1, [[3.0, 4.0]])
    assert [path.name for path in (tmp_path / "data" / "pixmo_count" / "images").iterdir()] == [sums[0]]


def test_refcoco_in_shards(hub, tmp_path, monkeypatch):
    row = {
        "image": {"bytes": picture(1), "path": None},
        "answer": ["the cat", "a cat"],
        "bbox": [10.0, 5.0, 20.0, 10.0],
    }
    row |= {"question_id": "7"}
    Hub.files = {"lmms-lab/RefCOCO": {f"data/val-0000{k}-of-00002.parquet": table([row]) for k in range(2)}}
    ran = call(hub, tmp_path, "refcoco")
    assert ran.returncode == 0, ran.stderr
    monkeypatch.chdir(tmp_path)
    found = open_source(ran.stdout.split()[-1])
    assert len(found) == 4 and list(found[0]["box"]) == [10, 5, 30, 15]


def test_refused(hub, tmp_path):
    with pytest.raises(InputError, match="known are pixmo, pr1:grounding, refcoco"):
        fetch.fetch("imagenet", tmp_path)
    ran = call(hub, tmp_path, "refcoco")  # the hub has no such repository
    assert ran.returncode == 2 and "lmms-lab/RefCOCO" in ran.stderr
