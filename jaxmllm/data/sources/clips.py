"""`video:FOLDER`, `mot:`, `got10k:`, `lasot:`, `clips:`: clips, annotated or not, see `data.clip_files`."""

from jaxmllm.data import clip_files
from jaxmllm.data.sources.registry import register

register("video")(clip_files.open_videos)
for _kind in clip_files.READERS:
    register(_kind)(clip_files.opener(_kind))
