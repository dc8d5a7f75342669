"""Published data sets from the Hugging Face hub, laid out where the recipes look for them: `jaxmllm data fetch NAME`.

Files come through `huggingface_hub`, which goes on where it stopped and checks what it has; HF_TOKEN, HF_HOME and HF_ENDPOINT
count. Sets whose rows name pictures by address get those too, checked by their sum; one that is gone is counted and left out.
"""

import concurrent.futures
import dataclasses
import hashlib
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxmllm.errors import InputError
from jaxmllm.runfiles import replace_file

SECONDS = 30.0  # for one picture


@dataclasses.dataclass(frozen=True)
class Published:
    """A set on the hub, where its files go below the data folder, and how it is read."""

    repository: str  # owner/name
    folder: str
    files: tuple[str, ...]  # patterns
    source: str  # how a config names it
    pictures: bool = False  # rows hold image_url and image_sha256 in place of pictures


SETS: dict[str, Published] = {
    "pr1:grounding": Published(
        "Kangheng/PR1-Datasets-Grounding", "pr1/grounding", ("*.parquet",), "pr1:{path}?task=grounding"
    ),
    "refcoco": Published("lmms-lab/RefCOCO", "refcoco/lmms", ("data/val-*.parquet",), "refcoco:{path}"),
    "pixmo": Published(
        "allenai/pixmo-count", "pixmo_count", ("data/validation-*.parquet",), "pixmo:{path}?images={images}", True
    ),
}


def fetch(name: str, data: Path = Path("data"), done: Callable[[int, int], None] = lambda so_far, total: None) -> str:
    """Downloads a set, or what of it is missing; returns the source that reads it.

    `done` is told pictures so far and in all. Raises InputError for an unknown name and where the hub cannot be reached or
    has no such files; what has come stays, and the same call goes on.
    """
    if name not in SETS:
        raise InputError(f"data fetch {name!r}: known are {', '.join(sorted(SETS))}")
    from huggingface_hub import snapshot_download

    published, folder = SETS[name], data / SETS[name].folder
    try:
        snapshot_download(
            published.repository, repo_type="dataset", local_dir=folder, allow_patterns=list(published.files)
        )
    except Exception as error:  # the hub's client raises whatever it meets
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"{name}: {published.repository} could not be fetched ({why}); the same command goes on where it stopped. A set that "
            "asks for terms needs HF_TOKEN"
        ) from error
    found = sorted(path for pattern in published.files for path in folder.rglob(pattern.rpartition("/")[2]))
    if not found:
        raise InputError(f"{name}: {published.repository} holds no {', '.join(published.files)}")
    path = found[0] if len(found) == 1 else found[0].parent
    if published.pictures:
        path = _with_pictures(found, folder, done)
    return published.source.format(path=path, images=folder / "images")


def _with_pictures(tables: Iterable[Path], folder: Path, done: Callable[[int, int], None]) -> Path:
    """Downloads the pictures of rows, and writes `validation.parquet` of those that came, with their names as `image`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [row for path in tables for row in pq.read_table(path).to_pylist()]
    wanted = {row["image_sha256"]: row["image_url"] for row in rows}
    there = set()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        jobs = {pool.submit(_picture, url, sha256, images): sha256 for sha256, url in wanted.items()}
        for number, job in enumerate(concurrent.futures.as_completed(jobs), 1):
            if job.result():
                there.add(jobs[job])
            done(number, len(jobs))
    kept = [
        {"image": row["image_sha256"], **{k: row[k] for k in ("label", "count", "points")}}
        for row in rows
        if row["image_sha256"] in there
    ]
    if not kept:
        raise InputError(f"{folder}: none of {len(wanted)} pictures could be fetched; the same command tries again")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(kept), sink)
    replace_file(folder / "validation.parquet", sink.getvalue().to_pybytes())
    return folder / "validation.parquet"


def _picture(url: str, sha256: str, folder: Path) -> bool:
    """Whether the picture with that sum is there, fetched where it is not."""
    # the sum names the file: what a table says is no path
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef") or not url.startswith(("http://", "https://")):
        return False
    path = folder / sha256
    if path.exists():
        return True
    try:
        asked = urllib.request.Request(url, headers={"User-Agent": "jaxmllm"})
        with urllib.request.urlopen(asked, timeout=SECONDS) as answer:
            content = answer.read()
    except (OSError, ValueError):
        return False
    if hashlib.sha256(content).hexdigest() != sha256:
        return False
    replace_file(path, content)
    return True
