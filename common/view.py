"""Runs and corpora to look at, as one HTML page that needs no server and no network.

python -m common.view RUN|FILE ... [--out FILE]

Paths of all patterns in 3D, each episode's video beside its path, success, leakage, distances, curves, arguments and versions.
The page is common/view.html; here is the data that is put into it.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import mujoco
import numpy as np
import tyro

from common import metrics, plots
from common.cli import Count, Range, UserError, atomic_path, run_command
from common.data import Episode, read_attrs, read_episodes
from common.libero import Task, load_task
from common.libero.assets import assets_like
from common.libero.judge import goal_reached
from common.libero.observation import StateObservation
from common.libero.renderers import available, make_renderer
from common.runs import Progress, load_checkpoint, plain_json, read_finished
from common.video import write_video

TEMPLATE = Path(__file__).with_suffix(".html")
MAX_BYTES = 19 * 10**6  # of the page
MAX_EPISODES = 400  # of a source: distances are a matrix
STRIDE, FPS = 2, 10  # every second control step, at LIBERO's 20 Hz
CRF = 25
UNIT = 1e-3  # m: paths are whole numbers of it
DTW_UNIT = 1e-4  # m: distances are 16-bit numbers of it


def write_report(run: Path, task: Task, progress: Progress) -> None:
    """Write RUN/report.html of a run that has just ended, and a line about it.

    It renders nothing: beside the paths are the videos that the run has made, of one episode a pattern. The run is done, so what goes
    wrong here is said and no more.
    """
    path = default_out([run])
    try:
        source = _read(run, task)
        page = {"sources": [describe(*source)], "fps": FPS, "stride": STRIDE}  # as rollout.make_videos has them, too
        page["videos"], page["videos_note"] = _videos_of_run(run, page["sources"][0]["episodes"])
        _write(path, page)
        progress.say(f"to look at: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    except Exception as error:
        progress.say(f"no {path.name}: {' '.join(str(error).split()) or type(error).__name__}; python -m common.view {run} makes it")


def write_page(
    path: Path,
    sources: Sequence[Path],
    assets: str | None = None,
    videos: int = 160,
    each: int | None = None,
    progress: Progress | None = None,
    rrd: Path | None = None,
) -> None:
    """Write the page of runs (folders) and corpora or demonstrations (files) to `path`, whole or not at all.

    Args:
        assets: LIBERO's asset folder or "standin", default of the kind that the sources were made on.
        videos: pixels of a video's side; 0: none. Videos that would make the page larger than MAX_BYTES are left out, which it says.
        each: so many episodes of a pattern have a video (None: all).
        rrd: also write paths and videos to this file, for Rerun.

    Raises UserError for a folder that is not a finished run with a corpus, for what `read_episodes` and `load_task` refuse, and where
    `rrd` is wanted and rerun-sdk is missing.
    """
    progress = progress or Progress()
    rerun = find_rerun() if rrd else None
    loaded = [_load(source, assets) for source in sources]
    page = {"sources": [describe(*source) for source in loaded], "fps": FPS, "stride": STRIDE, "videos": {}, "videos_note": ""}
    if videos:
        possible, reason = available()
        if possible:
            room = MAX_BYTES - len(TEMPLATE.read_text()) - len(_as_json(page))
            page["videos"], page["videos_note"] = _videos(page["sources"], loaded, videos, each, room, progress)
        else:
            page["videos_note"] = f"no videos: {reason}"
    _write(path, page)
    if rrd:
        with atomic_path(rrd) as temporary:
            _write_rrd(rerun, temporary, page)


def _write(path: Path, page: dict[str, Any]) -> None:
    """The page with its data in it, whole or not at all."""
    page = {"unit": UNIT, "dtw_unit": DTW_UNIT, "made": time.strftime("%Y-%m-%d %H:%M"), **page}
    title = html.escape(page["sources"][0]["title"] + (f" and {n} more" if (n := len(page["sources"]) - 1) else ""))
    with atomic_path(path) as temporary:
        temporary.write_text(TEMPLATE.read_text().replace("__TITLE__", title, 1).replace("__DATA__", _as_json(page), 1))


def _load(source: Path, assets: str | None) -> tuple[Path, Task, list[Episode]]:
    """A run or a file with its task and its episodes."""
    file = source / "corpus.hdf5" if source.is_dir() else source
    if source.is_dir():
        read_finished(source)
        if not file.is_file():
            raise UserError(f"{source} has no corpus.hdf5; name a run of dlr_discover, gaussian_ppo or diffusion_ppo")
    attrs = read_attrs(file)
    try:
        # assets of the same kind will do, to look at: what moved where is in the file
        name = attrs.get("bddl_file_name") or file.stem.removesuffix("_demo")
        task = load_task(name.removesuffix(".bddl"), assets_like(attrs.get("assets"), assets))
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return _read(source, task)


def _read(source: Path, task: Task) -> tuple[Path, Task, list[Episode]]:
    """The same, of a known task; of very many episodes, as many of each pattern as there is room for."""
    file = source / "corpus.hdf5" if source.is_dir() else source
    episodes = read_episodes(file, task, judge=lambda unknown: goal_reached(task, unknown))
    names = group_names(episodes)
    order = round_robin(names)[:MAX_EPISODES]
    return source, task, [episodes[i] for i in sorted(order, key=lambda i: (names[i][0], i))]


def group_names(episodes: Sequence[Episode]) -> list[tuple[int, str]]:
    """(colour, name) of what each episode is an example of: its pattern, or else the demonstrator's strategy."""
    if any(e.attrs["pattern"] >= 0 for e in episodes) or not any(e.attrs["strategy"] for e in episodes):
        return [(p, f"pattern {p}" if p >= 0 else "no pattern") for p in (int(e.attrs["pattern"]) for e in episodes)]
    strategies = list(dict.fromkeys(e.attrs["strategy"] for e in episodes))
    return [(strategies.index(e.attrs["strategy"]), e.attrs["strategy"] or "no strategy") for e in episodes]


def round_robin(groups: Sequence, each: int | None = None) -> list[int]:
    """Indices of items, first one of each group, then another of each, ..., `each` at most."""
    seen: dict[Any, int] = {}
    turns = []
    for i, group in enumerate(groups):
        seen[group] = seen.get(group, -1) + 1
        turns.append((seen[group], i))
    return [i for turn, i in sorted(turns) if each is None or turn < each]


def describe(source: Path, task: Task, episodes: Sequence[Episode]) -> dict[str, Any]:
    """All that the page shows of a source but its videos, as JSON has it."""
    config, summary = read_finished(source) if source.is_dir() else ({}, {})
    groups = sorted(set(named := group_names(episodes)))
    objects = StateObservation(task).objects
    features = [features_of(task, e, [o.joint_qpos for o in objects]) for e in episodes]
    distances = metrics.pairwise_dtw(features)
    moved = [k for k in range(len(objects)) if any(np.ptp(x[:, 3 + 3 * k : 6 + 3 * k], axis=0).max() > 0.02 for x in features)]
    success = {row["pattern"]: row for row in summary.get("per_pattern", [])}
    rows = []
    for colour, name in groups:
        mine = [i for i, group in enumerate(named) if group == (colour, name)]
        row = success.get(colour, {})
        rows.append({"id": colour, "name": name, "colour": plots.COLOURS[colour % len(plots.COLOURS)] if colour >= 0 else "#888888"})
        rows[-1] |= {"dashed": colour // len(plots.COLOURS) % 2 == 1, "corpus": len(mine)}
        rows[-1] |= {"success": row.get("success_rate"), "episodes": row.get("episodes"), "length": row.get("mean_length")}
        rows[-1] |= {"dtw": metrics.within_between(distances[np.ix_(mine, mine)], [0] * len(mine))[0]}
    within, between = metrics.within_between(distances, named)
    attrs = read_attrs(source / "corpus.hdf5" if source.is_dir() else source)
    return plain_json(
        {
            "name": source.resolve().name,
            "kind": "run" if source.is_dir() else "file",
            "title": task.language,
            "task": task.id,
            "script": config.get("script") or attrs.get("script", ""),
            "groups": rows,
            "episodes": [_episode(e, g, x, moved) for e, g, x in zip(episodes, named, features, strict=True)],
            "objects": [objects[k].name for k in moved],
            "things": _things(task, episodes[0].states[0]),
            "dtw": _packed(distances),
            "dtw_within": within,
            "dtw_between": between,
            "leakage": summary.get("leakage"),
            "curves": _curves(source, config, summary),
            "summary": {k: v for k, v in summary.items() if k not in ("per_pattern", "leakage", "versions")},
            "args": config.get("args", {}),
            "assets": {"made on": attrs.get("assets", "unknown"), "drawn with": task.image_assets},
            "versions": summary.get("versions") or {k.removeprefix("version_"): v for k, v in attrs.items() if k.startswith("version_")},
        }
    )


def features_of(task: Task, episode: Episode, free: Sequence[int]) -> np.ndarray:
    """(T, 3 + 3 n) metres after each action: where the hand and the goal's movable objects are, as diversity is measured on; in a file
    without final states, objects end where they were a step before."""
    last = episode.states[-1] if episode.final_state is None else episode.final_state
    return metrics.trajectory_features(episode.proprio["ee_pos"], np.vstack([episode.states[1:], last]), free)


def _episode(episode: Episode, group: tuple[int, str], features: np.ndarray, moved: Sequence[int]) -> dict[str, Any]:
    whole = np.round(features / UNIT).astype(int)
    shown = {"init_state", "seed", "source", "strategy"} & episode.attrs.keys()
    return {
        "group": group[0],
        "steps": episode.length,
        "success": bool(episode.success),
        "path": whole[:, :3].ravel().tolist(),
        "objects": [whole[:, 3 + 3 * k : 6 + 3 * k].ravel().tolist() for k in moved],
        "facts": {name: episode.attrs[name] for name in sorted(shown) if episode.attrs[name] not in ("", -1)},
    }


def _things(task: Task, state: np.ndarray) -> list[dict[str, Any]]:
    """Names and positions (m) of the task's objects and fixtures in a state."""
    data = mujoco.MjData(task.model)
    data.qpos[:] = state[1 : 1 + task.model.nq]
    mujoco.mj_kinematics(task.model, data)
    return [{"name": re.sub(r"_\d+$", "", o.name).replace("_", " "), "at": data.xpos[o.body].round(3)} for o in task.objects.values()]


def _packed(distances: np.ndarray) -> str:
    """(N, N) metres -> base64 of little-endian 16-bit numbers of DTW_UNIT."""
    return base64.b64encode(np.clip(np.round(distances / DTW_UNIT), 0, 65535).astype("<u2").tobytes()).decode()


def _curves(source: Path, config: dict, summary: dict) -> dict[str, Any] | None:
    """Success over environment steps: steps (M,), rates (M, K); the first row is of the policy as it was learned from demonstrations."""
    if not (source / "checkpoint.pt").is_file():
        return None
    history = load_checkpoint(source / "checkpoint.pt", config["script"]).get("history")
    if not history:
        return None
    history = np.array(history, float)
    start = np.full((1, history.shape[1]), np.nan)
    start[0, 0] = 0.0
    stages = summary.get("stages", {})
    columns = [1 + row["pattern"] for row in summary["per_pattern"]] if history.shape[1] > 2 else [1]
    learned = stages.get("learn_per_pattern") or [stages.get("learn", math.nan)]
    if len(learned) == len(columns):
        start[0, columns] = learned
    history = np.vstack([start, history])
    return {"steps": history[:, 0], "success": history[:, 1:].round(4)}


def _as_json(page: dict[str, Any]) -> str:
    """JSON that doesn't end the script element that it stands in."""
    return json.dumps(page, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")


# ---------------------------------------------------------------------------------------------- videos


def _videos(
    described: list[dict], loaded: list[tuple[Path, Task, list[Episode]]], size: int, each: int | None, room: int, progress: Progress
):
    """{"source:episode": base64 of an mp4} of as many episodes as fit into `room` bytes, one of each group first; and what is left out."""
    order = [(s, i) for s, source in enumerate(described) for i in round_robin([e["group"] for e in source["episodes"]], each)]
    order = [order[k] for k in round_robin([s for s, _ in order])]
    progress.stage("videos", len(order))
    cameras = [make_renderer(task.model, ("agentview",), size, size) for _, task, _ in loaded]
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:

        def encode(name: str, frames: np.ndarray) -> str:
            write_video(file := Path(folder) / f"{name}.mp4", frames, FPS, crf=CRF)
            return base64.b64encode(file.read_bytes()).decode()

        waiting: list[tuple[str, Future]] = []

        def take(most: int) -> bool:
            """Take what is encoded, but for the last `most`; whether there is room for more."""
            nonlocal room
            while len(waiting) > most:
                name, future = waiting.pop(0)
                if (cost := len(future.result()) + 20) > room:
                    room = 0
                if room:
                    found[name], room = future.result(), room - cost
                    progress.update(1)
            return room > 0

        for s, i in order:
            if not take(4):
                break
            _, task, episodes = loaded[s]
            states = episodes[i].states[::STRIDE]
            frames = cameras[s].render(states[:, 1 : 1 + task.model.nq])["agentview"]
            waiting.append((f"{s}:{i}", pool.submit(encode, f"{s}-{i}", frames)))
        take(0)
    progress.close()
    notes = [] if each is None else [f"videos of up to {each} episodes a pattern; python -m common.view makes all of them"]
    if left := len(order) - len(found):
        notes.append(f"{left} of {len(order)} videos are left out, or the page would be too large")
    return found, "; ".join(notes)


def _videos_of_run(run: Path, episodes: Sequence[dict]) -> tuple[dict[str, str], str]:
    """{"0:episode": base64 of an mp4} of those that lie in RUN/videos, and what to say where an episode has none."""
    found = {}
    for i in round_robin([e["group"] for e in episodes], 1):
        if (file := run / "videos" / f"pattern_{episodes[i]['group']}.mp4").is_file():
            found[f"0:{i}"] = base64.b64encode(file.read_bytes()).decode()
    return found, f"a video of one episode a pattern; python -m common.view {run} makes all of them" if found else "the run made no videos"


# ---------------------------------------------------------------------------------------------- Rerun


def find_rerun():
    """The package rerun-sdk; UserError where it isn't installed."""
    try:
        import rerun
    except ImportError as error:
        raise UserError(f"--rrd needs rerun-sdk ({error}); run: pip install rerun-sdk") from error
    return rerun


def _write_rrd(rr, path: Path, page: dict[str, Any]) -> None:
    """SOURCE/PATTERN/EPISODE: the hand's path and the objects', a point that goes along it, and the video, on the timeline "time" (s)."""
    recording = rr.RecordingStream("rl-data-engine")
    recording.save(path)
    recording.log("/", rr.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
    for s, source in enumerate(page["sources"]):
        groups = {group["id"]: group for group in source["groups"]}
        for i, episode in enumerate(source["episodes"]):
            group = groups[episode["group"]]
            name = "/".join(map(rr.escape_entity_path_part, (source["name"], group["name"], f"episode {i}")))
            colour = [int(group["colour"][k : k + 2], 16) for k in (1, 3, 5)]
            hand, *tracks = (np.reshape(flat, (-1, 3)) * UNIT for flat in (episode["path"], *episode["objects"]))
            recording.log(f"{name}/path", rr.LineStrips3D([hand], colors=[colour], radii=0.0015), static=True)
            for thing, track in zip(source["objects"], tracks, strict=True):
                recording.log(f"{name}/{thing}", rr.LineStrips3D([track], colors=[colour], radii=0.0007), static=True)
            time = rr.TimeColumn("time", duration=np.arange(1, len(hand) + 1) / 20)  # a path's points are of after the actions
            recording.log(f"{name}/hand", rr.Points3D.from_fields(colors=[colour], radii=0.006), static=True)
            recording.send_columns(f"{name}/hand", [time], rr.Points3D.columns(positions=hand))
            if mp4 := page["videos"].get(f"{s}:{i}"):
                video = rr.AssetVideo(contents=base64.b64decode(mp4), media_type="video/mp4")
                recording.log(f"{name}/video", video, static=True)
                shown = video.read_frame_timestamps_nanos()
                references = rr.VideoFrameReference.columns_nanos(shown)
                recording.send_columns(f"{name}/video", [rr.TimeColumn("time", duration=shown / 1e9)], references)
    recording.flush()
    recording.disconnect()


# ---------------------------------------------------------------------------------------------- command


def default_out(sources: Sequence[Path]) -> Path:
    """RUN/report.html of a run, FILE.html beside a file; of several sources, report.html here."""
    if len(sources) > 1:
        return Path("report.html")
    return sources[0] / "report.html" if sources[0].is_dir() else sources[0].with_suffix(".html")


def main(
    sources: tyro.conf.Positional[list[Path]],
    out: Path | None = None,
    videos: bool = True,
    each: Count | None = None,
    size: Annotated[int, Range(32, 512)] = 160,
    assets: str | None = None,
    rrd: bool = False,
) -> None:
    """Make one HTML page of runs and corpora, to be opened in a browser: no server, no network.

    Args:
        sources: Folders of finished runs, and HDF5 files in LIBERO's layout.
        out: The page (default: report.html in the run's folder; FILE.html beside a file; report.html here, of several).
        videos: Videos of the episodes, as far as the page has room.
        each: Of so many episodes a pattern only (default: of all).
        size: Pixels of a video's side.
        assets: LIBERO's asset folder, or standin (default: of the kind that the sources were made on).
        rrd: Also write the paths and the videos for Rerun (needs rerun-sdk), as the page's name with .rrd.
    """
    if not sources:
        raise UserError("nothing to look at; name run folders or HDF5 files")
    if not Range(32, 512).holds(size):
        raise UserError(f"--size must be {Range(32, 512)}, not {size}")
    if each is not None and each < 1:
        raise UserError(f"--each must be at least 1, not {each}")
    progress, out = Progress(), out or default_out(sources)
    try:
        write_page(out, sources, assets, (size - size % 2) * videos, each, progress, out.with_suffix(".rrd") if rrd else None)
    finally:
        progress.close()
    for path in (out, out.with_suffix(".rrd"))[: 1 + rrd]:
        progress.say(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
