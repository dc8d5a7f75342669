"""A policy that does not watch: it sees one frame perfectly, reads the prompt, copies boxes and guesses what is done.

What it earns beside the true answer is what a reward pays for something else than following a clip.
"""

from jaxmllm.tasks import track_rewards, tracks
from jaxmllm.tasks.trajectories import constant_velocity
from jaxmllm.world.clips import MOTIONS


def answer(record, rng):
    """The tagged answer to a record of the tracks task, from one frame drawn at random."""
    query, gt = record["query"], tracks.ground_truth(record)
    seen = int(rng.integers(1, len(record["frames"]) + 1))
    there = [track for track in record["tracks"] if str(seen) in track["boxes"]]
    if query["kind"] == "event":  # the frame does not show who does it
        chosen = [there[rng.integers(len(there))]] if there else []
    else:
        chosen = [track for track in record["tracks"] if track["id"] in query["ids"]]
    whole = tracks.ground_truth({**record, "query": {**query, "ids": [t["id"] for t in record["tracks"]]}})["tracks"]
    lines = []
    for track in chosen:
        boxes = track_rewards.by_frame(whole[track["id"]]["boxes"])
        given = query.get("frames") or ([query["frame"]] if "frame" in query else [])
        known = {t: boxes[t] for t in {*given, seen} if t in boxes}
        if not known:
            continue
        frames = range(1, gt["T"] + 1)
        path = dict.fromkeys(frames, boxes[seen] if seen in boxes else known[max(known)])
        if len(given) > 1:
            path = constant_velocity({t: boxes[t] for t in given}, list(frames))
        lines.append(track_rewards.write_track(track["id"], track["names"][0], {**path, **known}))
    attrs = {
        "action": list(MOTIONS)[rng.integers(len(MOTIONS))],
        "appearance": (chosen[0].get("appearance") or [""])[0] if chosen else "",
    }
    attrs = {key: attrs[key] for key in gt["attrs"]}
    block = "\n".join([*lines, track_rewards.write_attrs(attrs)] if attrs else lines)
    return f"<answer>\n{block}\n</answer>"
