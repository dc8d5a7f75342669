"""`pr1:FILE`: rows of Perception-R1 and VLM-R1, or a YAML mixture of such files."""

from pathlib import Path

from jaxmllm.data import records
from jaxmllm.data.rows import existing
from jaxmllm.data.selection import RecordSource, sample
from jaxmllm.data.sources.files import file_source
from jaxmllm.data.sources.mixture import Mixture
from jaxmllm.data.sources.registry import register
from jaxmllm.errors import InputError


@register("pr1")
def open_pr1(
    path: str, images: str | None = None, task: str | None = None, frame: str | None = None, seed: int = 0
) -> RecordSource:
    """Rows, or a YAML file {"datasets": [{"json_path", "sampling_strategy", "data_root" or "image_root"}]}."""
    if Path(path).suffix not in (".yaml", ".yml"):
        return file_source(path, records.perception_r1, "image", images, task=task, frame=frame)
    import yaml

    file = existing(path)
    try:
        entries = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("datasets")
    except (yaml.YAMLError, OSError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: not readable as YAML with a list datasets ({error})") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{file}: datasets must be a list of json_path and sampling_strategy")
    parts = []
    for k, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str):
            raise InputError(f"{file}: datasets[{k}]: json_path is missing")
        root = entry.get("data_root") or entry.get("image_root") or images
        try:
            part = open_pr1(str(file.parent / entry["json_path"]), root and str(file.parent / root), task, frame)
            part = sample(part, str(entry.get("sampling_strategy", "all")), seed + k)
        except InputError as error:
            raise InputError(f"{file}: datasets[{k}]: {error}") from None
        parts.append(part)
    return Mixture(parts)
