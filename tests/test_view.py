"""The page of runs and corpora: what is in it is what is in the files; it needs nothing else; a browser draws it and can be used on it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest

from common import metrics, view
from common.cli import UserError
from common.data import read_episodes, write_episodes
from common.libero.observation import StateObservation
from common.libero.renderers import available, make_renderer
from common.rollout import path_features
from common.runs import Progress, save_checkpoint, write_json
from common.video import find_ffmpeg


@pytest.fixture(scope="module")
def run(drawer_task, demos, tmp_path_factory):
    """A finished run of dlr_discover's kind: patterns 0 (four episodes) and 2 (three) of three."""
    folder = tmp_path_factory.mktemp("runs") / "a_run"
    episodes = read_episodes(demos, drawer_task)[:8]
    for i, episode in enumerate(episodes):
        episode.attrs.update(pattern=2 * (i % 2), source="dlr_discover")
    folder.mkdir()
    corpus = sorted(episodes[:7], key=lambda e: e.attrs["pattern"])
    write_episodes(folder / "corpus.hdf5", corpus, drawer_task, {"script": "dlr_discover", "assets": drawer_task.assets})
    write_json(folder / "config.json", {"script": "dlr_discover", "args": {"seed": 1, "task": "</script><b>&"}})
    rows = [{"pattern": p, "success_rate": r, "episodes": 5, "mean_length": n} for p, r, n in ((0, 0.8, 61.5), (2, 0.0, None))]
    summary = {"task": drawer_task.id, "success_rate": 0.4, "per_pattern": rows, "consistency": float("nan"), "diversity": {"a": 0.5}}
    summary |= {"stages": {"learn": 0.3, "learn_per_pattern": [0.6, 0.0]}, "versions": {"mujoco": "9.9"}}
    summary["leakage"] = {"p_leak": 0.125, "confusion": [[3, 0, 1], [0, 0, 0], [0, 0, 3]]}
    write_json(folder / "summary.json", summary)
    nan = float("nan")
    history = [[100, 0.7, nan, nan], [200, 0.9, nan, 0.1]]
    save_checkpoint(folder / "checkpoint.pt", {"script": "dlr_discover", "history": history})
    return folder


def written(tmp_path, sources, **options) -> tuple[str, dict]:
    """The page's text, and the data in it."""
    view.write_page(tmp_path / "page.html", sources, **options)
    return content(tmp_path / "page.html")


def content(path) -> tuple[str, dict]:
    text = path.read_text()
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    return text, json.loads(data)


def test_the_data_is_the_runs(run, drawer_task, tmp_path):
    text, page = written(tmp_path, [run], videos=0)
    (source,) = page["sources"]
    corpus = read_episodes(run / "corpus.hdf5", drawer_task)
    assert source["title"] == drawer_task.language and source["task"] == drawer_task.id and source["name"] == "a_run"
    assert [e["group"] for e in source["episodes"]] == [0] * 4 + [2] * 3 == [e.attrs["pattern"] for e in corpus]
    for shown, episode in zip(source["episodes"], corpus, strict=True):
        path = np.array(shown["path"]).reshape(-1, 3) * page["unit"]
        np.testing.assert_allclose(path, episode.proprio["ee_pos"], atol=0.5001e-3)
        assert shown["steps"] == episode.length == len(path) and shown["success"]
        assert shown["facts"]["strategy"] == episode.attrs["strategy"]
    packed = np.frombuffer(base64.b64decode(source["dtw"]), "<u2").reshape(7, 7) * page["dtw_unit"]
    distances = metrics.pairwise_dtw(path_features(drawer_task, corpus))
    np.testing.assert_allclose(packed, distances, atol=0.51e-4)
    assert [source["dtw_within"], source["dtw_between"]] == pytest.approx(metrics.within_between(distances, [0] * 4 + [2] * 3))
    assert [(g["id"], g["name"], g["corpus"], g["success"], g["length"]) for g in source["groups"]] == [
        (0, "pattern 0", 4, 0.8, 61.5),
        (2, "pattern 2", 3, 0.0, None),
    ]
    assert source["curves"] == {"steps": [0, 100, 200], "success": [[0.6, None, 0.0], [0.7, None, None], [0.9, None, 0.1]]}
    assert source["leakage"]["confusion"] == [[3, 0, 1], [0, 0, 0], [0, 0, 3]] and source["summary"]["consistency"] is None
    assert source["args"] == {"seed": 1, "task": "</script><b>&"} and source["versions"] == {"mujoco": "9.9"}
    assert source["assets"] == {"made on": drawer_task.assets, "drawn with": drawer_task.image_assets}
    names = {thing["name"]: thing["at"] for thing in source["things"]}
    bowl = drawer_task.objects["akita_black_bowl_1"]
    np.testing.assert_allclose(names["akita black bowl"], corpus[0].states[0, 1 + bowl.joint_qpos :][:3], atol=1e-3)


def test_nothing_from_elsewhere(run, tmp_path):
    """No address but SVG's namespace, no file but the page; and it is small."""
    text, _ = written(tmp_path, [run], videos=0)
    assert set(re.findall(r"https?:[^\"'\s)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"<(?:link|img|iframe|script[^>]* src)|@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
    assert len(text) < 150_000


def test_videos(run, drawer_task, tmp_path, monkeypatch):
    """Each episode's video shows every second state of it, 10 a second; what has no room is left out, last of each pattern first."""
    possible, reason = available()
    if not possible:
        pytest.skip(reason)
    _, page = written(tmp_path, [run], videos=64)
    assert sorted(page["videos"]) == [f"0:{i}" for i in range(7)] and page["videos_note"] == ""
    (tmp_path / "one.mp4").write_bytes(base64.b64decode(page["videos"]["0:5"]))
    command = [find_ffmpeg(), "-loglevel", "error", "-i", str(tmp_path / "one.mp4"), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    frames = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8).reshape(-1, 64, 64, 3)
    states = read_episodes(run / "corpus.hdf5", drawer_task)[5].states[::2]
    pictures = make_renderer(drawer_task.model, ("agentview",), 64, 64).render(states[:, 1 : 1 + drawer_task.model.nq])["agentview"]
    assert len(frames) == len(pictures)
    error = np.abs(frames.astype(float) - pictures).mean((1, 2, 3))
    assert error.max() < 8 < np.abs(frames[0].astype(float) - pictures[-1]).mean()
    rest = len((tmp_path / "page.html").read_text()) - sum(map(len, page["videos"].values()))
    monkeypatch.setattr(view, "MAX_BYTES", rest + sum(len(page["videos"][f"0:{i}"]) for i in (0, 4, 1)) + 100)
    _, page = written(tmp_path, [run], videos=64)
    assert sorted(page["videos"]) == ["0:0", "0:1", "0:4"]
    assert page["videos_note"] == "4 of 7 videos are left out, or the page would be too large"
    _, page = written(tmp_path, [run], videos=64, each=1)
    assert sorted(page["videos"]) == ["0:0", "0:4"] and page["videos_note"].startswith("videos of up to 1 episodes a pattern")
    monkeypatch.setattr(view, "available", lambda: (False, "no ffmpeg"))
    assert written(tmp_path, [run])[1]["videos_note"] == "no videos: no ffmpeg"


def test_demonstrations_by_strategy(run, demos, drawer_task, tmp_path, monkeypatch):
    """A file of demonstrations has no patterns but strategies; of too many episodes, some of each are shown; two sources, one page."""
    _, page = written(tmp_path, [demos, run], videos=0)
    source = page["sources"][0]
    assert [(g["name"], g["corpus"], g["success"]) for g in source["groups"]] == [("one way", 10, None), ("another", 10, None)]
    assert source["kind"] == "file" and source["curves"] is None and source["leakage"] is None and len(page["sources"]) == 2
    monkeypatch.setattr(view, "MAX_EPISODES", 5)
    _, page = written(tmp_path, [demos], videos=0)
    assert [e["group"] for e in page["sources"][0]["episodes"]] == [0, 0, 0, 1, 1]


def test_round_robin():
    assert view.round_robin("aabacb") == [0, 2, 4, 1, 5, 3]
    assert view.round_robin("aabacb", 2) == [0, 2, 4, 1, 5]


def test_files_without_final_states(demos, drawer_task, tmp_path):
    """As LIBERO's own: the hand's last position is in the proprioception, objects' is of a step before."""
    human = tmp_path / f"{drawer_task.name}_demo.hdf5"
    shutil.copy(demos, human)
    with h5py.File(human, "r+") as file:
        for name in list(file["data"].attrs):  # nor does it say what task it is of, but by its name
            del file["data"].attrs[name]
        for demo in file["data"].values():
            for name in ("final_state", "strategy", "pattern", "success"):
                demo.attrs.pop(name, None)
    episodes = read_episodes(human, drawer_task)
    free = [o.joint_qpos for o in StateObservation(drawer_task).objects]
    features = view.features_of(drawer_task, episodes[0], free)
    whole = path_features(drawer_task, read_episodes(demos, drawer_task)[:1])[0]
    np.testing.assert_array_equal(features[:-1], whole[:-1])
    np.testing.assert_array_equal(features[-1, :3], whole[-1, :3])
    _, page = written(tmp_path, [human], videos=0)
    assert [g["name"] for g in page["sources"][0]["groups"]] == ["no pattern"]


def test_errors(run, tmp_path):
    with pytest.raises(UserError, match="is not a finished run"):
        view.write_page(tmp_path / "x.html", [tmp_path])
    shutil.copytree(run, tmp_path / "vla", ignore=shutil.ignore_patterns("corpus.hdf5"))
    with pytest.raises(UserError, match="has no corpus.hdf5; name a run of"):
        view.write_page(tmp_path / "x.html", [tmp_path / "vla"])
    with pytest.raises(UserError, match="no such file"):
        view.write_page(tmp_path / "x.html", [tmp_path / "none.hdf5"])
    with pytest.raises(UserError, match="nothing to look at"):
        view.main([])
    with pytest.raises(UserError, match="--size must be between 32 and 512"):
        view.main([run], size=8)
    with pytest.raises(UserError, match="--each must be at least 1"):
        view.main([run], each=0)
    assert not (tmp_path / "x.html").exists()


def test_report_of_a_run_that_has_just_ended(run, drawer_task, tmp_path, monkeypatch, capsys):
    """The run's own videos, and nothing is rendered; what goes wrong is a line."""
    monkeypatch.setattr(view, "make_renderer", None)
    shutil.copytree(run, folder := tmp_path / "run")
    view.write_report(folder, drawer_task, Progress())
    _, page = content(folder / "report.html")
    assert page["videos"] == {} and page["videos_note"] == "the run made no videos"
    (folder / "videos").mkdir()
    (folder / "videos" / "pattern_2.mp4").write_bytes(b"a video")
    view.write_report(folder, drawer_task, Progress())
    _, page = content(folder / "report.html")
    assert page["videos"] == {"0:4": base64.b64encode(b"a video").decode()} and "one episode a pattern" in page["videos_note"]
    assert (page["fps"], page["stride"]) == (10, 2) and len(page["sources"][0]["episodes"]) == 7
    assert capsys.readouterr().err.count(f"to look at: {folder / 'report.html'} (") == 2
    before = (folder / "report.html").read_bytes()
    (folder / "summary.json").write_text("{")
    view.write_report(folder, drawer_task, Progress())
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"no report.html: {folder} is not a finished run" in said and "python -m common.view" in said
    assert (folder / "report.html").read_bytes() == before


def test_rerun(run, drawer_task, tmp_path, monkeypatch):
    """Rerun reads back every episode's path, over its seconds."""
    with monkeypatch.context() as patch, pytest.raises(UserError, match="--rrd needs rerun-sdk .*; run: pip install rerun-sdk"):
        patch.setitem(sys.modules, "rerun", None)
        view.main([run], out=tmp_path / "none.html", videos=False, rrd=True)
    assert not list(tmp_path.iterdir())
    dataframe = pytest.importorskip("rerun.dataframe", reason="needs rerun-sdk 0.26, whose reader newer ones lack")
    view.main([run], out=tmp_path / "page.html", videos=available()[0], size=64, rrd=True)
    recording = dataframe.load_recording(tmp_path / "page.rrd")
    assert recording.application_id() == "rl-data-engine"
    for i, episode in enumerate(read_episodes(run / "corpus.hdf5", drawer_task)):
        name = f"/a_run/pattern\\ {episode.attrs['pattern']}/episode\\ {i}/hand"
        table = recording.view(index="time", contents=name).select().read_all()
        places = np.array([row[0] for row in table[f"{name}:Points3D:positions"].to_pylist()])
        np.testing.assert_allclose(places, episode.proprio["ee_pos"], atol=0.51e-3)
        seconds = np.array(table["time"].cast("int64").to_pylist()) / 1e9
        np.testing.assert_allclose(seconds, np.arange(1, episode.length + 1) / 20)


def test_where_the_page_goes(run, demos):
    assert view.default_out([run]) == run / "report.html"
    assert view.default_out([demos]) == demos.with_suffix(".html")
    assert str(view.default_out([run, demos])) == "report.html"


PROBE = """
<script>
(async () => {
  const result = { episodes: source.episodes.length, chosen, patterns: source.groups.map(g => g.id) };
  const send = (type, x, y, more = {}) => {
    const box = canvas.getBoundingClientRect();
    const event = new PointerEvent(type, { clientX: box.left + x, clientY: box.top + y, pointerId: 1, bubbles: true, buttons: 1, ...more });
    canvas.dispatchEvent(event);
  };
  const drawn = () => canvas.toDataURL();
  const g = group(source.episodes[chosen]), [x, y] = projected[chosen][projected[chosen].length >> 1];
  const density = window.devicePixelRatio || 1;
  result.colour = [...pen.getImageData(Math.round(x * density), Math.round(y * density), 1, 1).data.slice(0, 3)];
  result.wanted = g.colour;
  let before = drawn();
  send("pointerdown", 300, 100); send("pointermove", 380, 130); send("pointerup", 380, 130);
  result.turned = drawn() !== before; result.azimuth = eye.azimuth;
  const far = eye.distance; before = drawn();
  canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: -200, cancelable: true }));
  result.zoomed = eye.distance / far; result.zoom_drawn = drawn() !== before;
  look("front"); draw();
  const other = source.episodes.length - 1, end = projected[other].at(-1);
  send("pointerdown", end[0], end[1]); send("pointerup", end[0], end[1]);
  const tip = projected[chosen].at(-1);
  result.picked = group(source.episodes[chosen]).id; result.picked_end = Math.hypot(tip[0] - end[0], tip[1] - end[1]);
  document.querySelector('#legend [data-group="2"]').click();
  result.left = projected.filter(Boolean).length; result.cells = document.getElementById("dtw").width;
  document.querySelector('#legend [data-group="2"]').dispatchEvent(new MouseEvent("dblclick"));
  result.only = projected.filter(Boolean).length; result.now = chosen;
  result.rows = document.querySelectorAll("#success tbody tr").length;
  result.curves = document.querySelectorAll("#curves path").length;
  result.leakage = [...document.querySelectorAll("#leakage td")].map(td => td.textContent);
  result.injected = document.querySelectorAll("#about b").length;
  if (video) {
    await new Promise(done => { if (video.readyState >= 2) done(); else video.onloadeddata = done; });
    result.seconds = video.duration; result.width = video.videoWidth;
  }
  result.error = document.body.dataset.error ?? null;
  document.body.dataset.probe = JSON.stringify(result);
})();
</script>
"""


def test_in_a_browser(run, drawer_task, tmp_path):
    """Headless Chromium, from file://: it draws the paths in their colours, turns, zooms, picks, filters, and plays the videos."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    possible, _ = available()
    text, page = written(tmp_path, [run], videos=64 if possible else 0)
    (tmp_path / "page.html").write_text(text.replace("</body>", PROBE + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1400,1200", "--virtual-time-budget=8000", "--dump-dom"]
    url = (tmp_path / "page.html").as_uri()
    dom = subprocess.run([browser, *flags, url], capture_output=True, text=True, timeout=120).stdout
    assert 'data-ready="7"' in dom, dom[-3000:]
    result = json.loads(re.search(r'data-probe="([^"]*)"', dom)[1].replace("&quot;", '"'))
    assert result["error"] is None and result["episodes"] == 7 and result["chosen"] == 0 and result["patterns"] == [0, 2]
    wanted = [int(result["wanted"][i : i + 2], 16) for i in (1, 3, 5)]
    np.testing.assert_allclose(result["colour"], wanted, atol=40)
    assert result["turned"] and result["azimuth"] == pytest.approx(0.35 - 0.008 * 80)
    assert result["zoom_drawn"] and result["zoomed"] == pytest.approx(np.exp(-0.24))
    assert result["picked"] == 2 and result["picked_end"] < 9  # the path under the pointer, or another that ends there
    assert (result["left"], result["only"], result["now"]) == (4, 3, 4) and result["cells"] == 4 * 120
    assert (result["rows"], result["curves"]) == (2, 2)  # of one pattern shown, and the mean
    assert result["leakage"] == ["3", "", "1", "", "", "", "", "", "3"] and result["injected"] == 0
    if possible:
        length = read_episodes(run / "corpus.hdf5", drawer_task)[4].length
        assert result["seconds"] == pytest.approx(-(-length // 2) / 10, abs=0.06) and result["width"] == 64
