"""common/libero/render.py on a tiny scene: colours against OpenGL's lighting equation by hand, orientation, batches, videos, error lines.
At the end on a LIBERO task: pictures into a file of demonstrations."""

import dataclasses
import json
import os
import subprocess
import sys

import h5py
import mujoco
import numpy as np
import pytest

from common.cli import UserError
from common.data import check_file, read_episodes, write_episodes
from common.libero import render

# A camera 2 m above a textured floor, looking straight down, up in the picture = +y, 90 degrees: it sees 4 m x 4 m of the floor.
# The headlight gives ambient 0.25 and diffuse 0.5 along the view; no other light. A collision box (group 0) would hide it all.
SCENE = """
<mujoco>
  <visual><headlight ambient=".25 .25 .25" diffuse=".5 .5 .5" specular="0 0 0"/><map znear=".01"/></visual>
  <statistic extent="1"/>
  <asset>
    <texture name="quarters" type="2d" builtin="checker" width="64" height="64" rgb1="1 1 1" rgb2="0 0 1"/>
    <material name="floor" texture="quarters" texrepeat="1 1" texuniform="false" specular="0"/>
    <material name="plain" specular="0"/>
  </asset>
  <worldbody>
    <geom type="plane" size="2 2 1" material="floor" group="1"/>
    <geom type="box" size="2 2 .01" pos="0 0 1.5" group="0" contype="0" conaffinity="0"/>
    <site type="sphere" size=".5" pos="0 0 1" rgba="0 1 1 1"/>
    <camera name="top" pos="0 0 2" fovy="90"/>
    <camera name="front" pos="0 -2 1" xyaxes="1 0 0 0 0 1" fovy="60"/>
    <geom type="ellipsoid" size=".4 .2 .1" pos="1 -1.2 .2" euler="0 0 30" material="floor" group="1"/>
    <geom type="capsule" size=".1 .3" pos="0 1.5 .2" euler="60 20 0" rgba="1 1 1 1" material="plain" group="1"/>
    <body pos="1 1 .1"><joint type="slide" axis="1 0 0"/>
      <geom type="box" size=".1 .1 .1" rgba="1 0 0 1" material="plain" group="1"/>
    </body>
    <body pos="-1 1 .2"><joint type="slide" axis="0 0 1"/>
      <geom type="sphere" size=".2" rgba="0 1 0 1" material="plain" group="1"/>
    </body>
    <body pos="-1 -1 .1"><joint type="slide" axis="1 0 0"/>
      <geom type="cylinder" size=".2 .1" rgba="1 1 0 1" material="plain" group="1"/>
    </body>
  </worldbody>
</mujoco>"""


@pytest.fixture(scope="module")
def model():
    return mujoco.MjModel.from_xml_string(SCENE)


@pytest.fixture(scope="module")
def pictures(model):
    return render.make_renderer(model, ("top", "front"), 128, 128).render(np.zeros((1, 3)))


def at(picture, x, y, height=0.0):
    """The pixel of `top` where the point (x, y, height) appears."""
    scale = 64 / (2 - height)
    return picture[int(64 - y * scale), int(64 + x * scale)].astype(int)


def test_colours_follow_the_lighting_equation(model, pictures):
    # colour * (ambient + diffuse * cosine) * texture: surfaces that face the camera have cosine 1
    lit = round(255 * 0.75)
    top = pictures["top"][0]
    assert np.abs(at(top, 1, 1, 0.2) - [lit, 0, 0]).max() <= 1  # the box's upper side
    assert np.abs(at(top, -1, 1, 0.4) - [0, lit, 0]).max() <= 3  # the sphere's pole
    assert np.abs(at(top, -1, -1, 0.2) - [lit, lit, 0]).max() <= 1  # the cylinder's lid
    # halfway to the rim of the sphere the normal leans by 30 degrees: cosine 0.866 (perspective shifts it a little)
    leaning = at(top, -1 + 0.1, 1, 0.2 + 0.2 * np.cos(np.pi / 6))
    assert abs(leaning[1] - 255 * (0.25 + 0.5 * np.cos(np.pi / 6))) <= 4
    # the floor: MuJoCo's 2-D coordinates are 0.5 x / size - 0.5 and -0.5 y / size - 0.5, the texture's row 0 at v = 0
    texture = model.tex_data[: 64 * 64 * 3].reshape(64, 64, 3)
    for x, y in ((0.5, 0.3), (-0.5, 0.3), (0.5, -0.3), (-0.5, -0.3), (1.6, 0.4)):
        expected = texture[int((-0.25 * y - 0.5) % 1 * 64), int((0.25 * x - 0.5) % 1 * 64)] * 0.75
        assert np.abs(at(top, x, y) - expected).max() <= 1
    assert len({tuple(at(top, x, 0.3)) for x in (0.5, -0.5)}) == 2


def test_upright(pictures):
    front = pictures["front"][0].astype(int)  # the camera looks along +y, up is +z: a black sky over the floor
    assert front[:40].max() == 0 and front[90:].max() > 100
    red = (front[..., 0] > 100) & (front[..., 1:].max(-1) == 0)
    green = (front[..., 1] > 60) & (front[..., [0, 2]].max(-1) == 0)
    assert np.argwhere(red)[:, 1].mean() > 64 > np.argwhere(green)[:, 1].mean()  # +x is to the right


def test_states_move_things_and_batches_equal_singles(model):
    renderer = render.make_renderer(model, ("top", "front"), 64, 48)
    qpos = np.array([[0, 0, 0], [-0.5, 0.3, 0], [0.2, 0.1, 0.4], [0.4, 0, -0.3], [-1, 0.5, 0.1]], float)
    together = renderer.render(qpos)
    for name, pictures in together.items():
        assert pictures.shape == (5, 48, 64, 3) and pictures.dtype == np.uint8
        alone = [renderer.render(q[None])[name][0] for q in qpos]
        assert np.array_equal(pictures, alone)
        assert not any(np.array_equal(alone[i], alone[i + 1]) for i in range(4))
    renderer.batch = 2
    assert all(np.array_equal(renderer.render(qpos)[name], together[name]) for name in together)
    red = np.argwhere((together["top"][1][..., 0] > 100) & (together["top"][1][..., 1:].max(-1) == 0)).mean(0)
    scale = 24 / 1.8  # pixels a metre on the box's upper side, 1.8 m below the camera
    assert red == pytest.approx([24 - 1 * scale - 0.5, 32 + 0.5 * scale - 0.5], abs=0.6)  # moved from x = 1 to 0.5
    assert renderer.render(np.zeros((0, 3)))["top"].shape == (0, 48, 64, 3)


def test_threads_make_no_difference(model):
    qpos = np.random.default_rng(0).uniform(-0.3, 0.3, (3, 3))
    one, three = (render.make_renderer(model, ("top",), 50, 50, threads=n).render(qpos)["top"] for n in (1, 3))
    assert np.array_equal(one, three)


def test_cube_texture_and_transparency():
    model = mujoco.MjModel.from_xml_string("""
    <mujoco>
      <visual><headlight ambient="1 1 1" diffuse="0 0 0" specular="0 0 0"/><map znear=".01"/></visual><statistic extent="1"/>
      <asset>
        <texture name="sides" type="cube" builtin="gradient" width="32" height="192" rgb1="1 0 0" rgb2="0 0 1"/>
        <texture name="sky" type="skybox" builtin="flat" width="8" height="48" rgb1="0 .2 .4" rgb2="0 .2 .4"/>
        <material name="sides" texture="sides"/>
      </asset>
      <worldbody>
        <camera name="top" pos="0 0 2" fovy="90"/>
        <geom type="box" size=".3 .3 .3" pos="-.6 0 0" material="sides" group="1"/>
        <geom type="box" size=".3 .3 .3" pos=".6 0 0" rgba="1 1 1 .25" group="1"/>
      </worldbody>
    </mujoco>""")
    renderer = render.make_renderer(model, ("top",), 128, 128)
    picture = renderer.render(np.zeros((1, 0)))["top"][0]
    assert np.abs(picture[2, 2].astype(int) - [0, 51, 102]).max() <= 1  # the sky
    # alpha 0.25 over the sky; a cube's inner and lower sides are back faces, culled
    assert np.abs(picture[64, 64 + int(0.6 / 1.7 * 64)].astype(int) - (0.25 * 255 + 0.75 * np.array([0, 51, 102]))).max() <= 1
    texture = model.tex_data[model.tex_adr[0] :][: 192 * 32 * 3].reshape(6, 32, 32, 3)
    side = texture[4]  # +z: s = x, t = -y
    for u, v in ((0.25, 0.25), (0.5, 0.8), (0.75, 0.5)):
        x, y = -0.6 + 0.3 * (2 * u - 1), -0.3 * (2 * v - 1)
        pixel = picture[int(64 - y / 1.7 * 64), int(64 + x / 1.7 * 64)].astype(int)
        assert np.abs(pixel - side[int(v * 32), int(u * 32)].astype(int)).max() <= 12  # filtered


def test_video_round_trip(tmp_path):
    import imageio_ffmpeg

    frames = np.zeros((30, 64, 96, 3), np.uint8)
    frames[:, :32] = [200, 30, 30]  # the upper half
    frames[15:, 32:] = [30, 30, 200]
    path = tmp_path / "videos" / "a.mp4"
    render.write_video(path, frames, fps=20)
    assert os.listdir(path.parent) == ["a.mp4"]
    reader = imageio_ffmpeg.read_frames(str(path))
    info = next(reader)
    back = np.array([np.frombuffer(f, np.uint8).reshape(64, 96, 3) for f in reader]).astype(int)
    assert info["fps"] == 20 and tuple(info["size"]) == (96, 64) and len(back) == 30
    assert np.abs(back[:, 16, 48] - [200, 30, 30]).max() < 15 and np.abs(back[20, 48, 48] - [30, 30, 200]).max() < 15
    with pytest.raises(ValueError, match="even"):
        render.write_video(path, frames[:, :63])


def test_failed_video_leaves_nothing(tmp_path):
    """ffmpeg writes what it can to a full disk, and says so: the earlier file must stay."""
    path = tmp_path / "a.mp4"
    path.write_text("earlier")
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    )
    code = f"{limit}; import numpy as np; from common.libero import render; from common.cli import run_command; " + (
        f"run_command(lambda: render.write_video({str(path)!r}, np.random.default_rng(0).integers(0, 255, (20, 128, 128, 3), np.uint8)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert path.read_text() == "earlier" and os.listdir(tmp_path) == ["a.mp4"]


def test_error_lines(model):
    with pytest.raises(UserError, match="no camera 'side' in this model; choose from top, front"):
        render.make_renderer(model, ("side",))
    with pytest.raises(UserError, match="no renderer 'vulkan'; choose from warp, gl"):
        render.make_renderer(model, ("top",), renderer="vulkan")
    with pytest.raises(UserError, match="choose 1 to 4096"):
        render.make_renderer(model, ("top",), width=0)
    with pytest.raises(ValueError, match=r"not \(B, 3\)"):
        render.make_renderer(model, ("top",)).render(np.zeros(3))
    assert render.available() == (True, "")
    assert render.available("vulkan") == (False, "no renderer 'vulkan'; choose from warp, gl")


def test_unwritable_cache_and_quiet_start(tmp_path):
    """In a process of its own: nothing is printed at the start, kernels go to our cache folder, an unwritable one is one line."""
    code = "from common.libero import render; print(render.available())"
    path = {**os.environ, "PYTHONPATH": os.getcwd()}

    def run(cache):
        return subprocess.run(
            [sys.executable, "-c", code], env={**path, "RL_DATA_ENGINE_CACHE": str(cache)}, capture_output=True, text=True
        )

    good = run(tmp_path / "cache")
    assert (good.stdout, good.stderr) == ("(True, '')\n", "") and (tmp_path / "cache" / "warp").is_dir()
    (tmp_path / "file").write_text("")
    bad = run(tmp_path / "file")  # a file where the folder should be
    assert bad.stdout.startswith('(False, "cannot keep compiled kernels in') and "set RL_DATA_ENGINE_CACHE" in bad.stdout


def gl_available():
    return subprocess.run([sys.executable, "-c", "from common.libero import render; exit(not render.available('gl')[0])"]).returncode == 0


@pytest.mark.skipif("MUJOCO_GL" not in os.environ or not gl_available(), reason="needs a GL library and MUJOCO_GL=egl or osmesa")
def test_agrees_with_gl(model):
    qpos = np.array([[0, 0, 0], [0.3, 0.2, -0.2]], float)
    ours, theirs = (render.make_renderer(model, ("top", "front"), 128, 128, renderer=name).render(qpos) for name in render.RENDERERS)
    for name in ours:
        difference = np.abs(ours[name].astype(int) - theirs[name])
        assert np.median(difference) <= 1 and difference.mean() < 3  # edges differ: OpenGL smooths them


@pytest.fixture(scope="module")
def ends(drawer_task, demos):
    """The last steps of two demonstrations, in which the drawer moves; the second without the state after its last action."""
    short = []
    for episode, n in zip(read_episodes(demos, drawer_task)[:2], (5, 3), strict=True):
        proprio = {name: values[-n:] for name, values in episode.proprio.items()}
        short.append(dataclasses.replace(episode, actions=episode.actions[-n:], states=episode.states[-n:], proprio=proprio))
    short[1].final_state = None
    return short


@pytest.fixture
def corpus(drawer_task, ends, tmp_path):
    path = tmp_path / "corpus.hdf5"
    write_episodes(path, ends, drawer_task, {"script": "test", "assets": drawer_task.assets})
    with h5py.File(path, "a") as file:
        file["mask/train"] = [b"demo_0"]  # robomimic's
        file["data/demo_0/obs/extra"] = np.arange(5)
    return path


def test_images_show_the_states_after_the_actions(corpus, drawer_task, ends, assets):
    render.add_images(corpus, size=32, assets=assets)
    assert check_file(corpus, drawer_task) == []
    nq = drawer_task.model.nq
    camera = render.make_renderer(drawer_task.model, width=32, height=32)
    with h5py.File(corpus) as file:
        data = file["data"]
        for i, episode in enumerate(ends):
            after = [*episode.states[1:], episode.states[-1] if episode.final_state is None else episode.final_state]
            qpos = np.array(after)[:, 1 : 1 + nq]
            if episode.final_state is None:  # the robot is where its proprioception says, the objects are one step behind
                qpos[-1, drawer_task.arm_qpos] = episode.proprio["joint_states"][-1]
                qpos[-1, drawer_task.gripper_qpos] = episode.proprio["gripper_states"][-1]
            seen = camera.render(qpos)
            for name, view in (("agentview_rgb", "agentview"), ("eye_in_hand_rgb", "robot0_eye_in_hand")):
                stored = data[f"demo_{i}/obs/{name}"]
                assert stored.dtype == np.uint8 and stored.shape == (episode.length, 32, 32, 3) and stored.chunks == (1, 32, 32, 3)
                np.testing.assert_array_equal(stored[()], seen[view][:, ::-1])  # bottom row first
                assert not np.array_equal(stored[0], stored[-1])
        assert json.loads(data.attrs["env_args"])["env_kwargs"]["camera_heights"] == 32
        assert (data.attrs["renderer"], data.attrs["image_assets"], data.attrs["script"]) == ("warp", drawer_task.assets, "test")
        assert file["mask/train"][0] == b"demo_0" and np.array_equal(data["demo_0/obs/extra"], np.arange(5))
    for before, now in zip(ends, read_episodes(corpus, drawer_task, images=True), strict=True):
        np.testing.assert_array_equal(now.actions, before.actions)
        np.testing.assert_array_equal(now.states, before.states)
        assert now.attrs == {"init_state": -1, "pattern": -1, **before.attrs}
        assert set(now.images) == {"agentview_rgb", "eye_in_hand_rgb"}


def test_images_are_read_by_robomimic(corpus, assets):
    dataset = pytest.importorskip("robomimic.utils.dataset", reason="robomimic is not installed")
    obs_utils = pytest.importorskip("robomimic.utils.obs_utils")
    render.add_images(corpus, size=16, assets=assets)
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": ["ee_pos"], "rgb": ["agentview_rgb"]}})
    options = dict(dataset_keys=["actions"], load_next_obs=False, hdf5_cache_mode="low_dim", filter_by_attribute="train")
    sequences = dataset.SequenceDataset(hdf5_path=str(corpus), obs_keys=["ee_pos", "agentview_rgb"], **options)
    assert len(sequences) == 5
    with h5py.File(corpus) as file:
        expected = np.moveaxis(file["data/demo_0/obs/agentview_rgb"][2] / 255, -1, 0)
    np.testing.assert_array_equal(sequences[2]["obs"]["agentview_rgb"][0], expected.astype(np.float32))


def test_images_are_replaced_only_on_request(corpus, assets, monkeypatch):
    render.add_images(corpus, size=16, assets=assets)
    with pytest.raises(UserError, match=r"has pictures already \(agentview_rgb, eye_in_hand_rgb\); --overwrite"):
        render.add_images(corpus, size=16, assets=assets)
    before, monitor = corpus.read_bytes(), []
    monkeypatch.setattr(render._WarpRenderer, "_render", lambda self, qpos: monitor.append(len(qpos)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):  # amid the work
        render.add_images(corpus, size=16, assets=assets, overwrite=True)
    assert corpus.read_bytes() == before and monitor == [5] and os.listdir(corpus.parent) == [corpus.name]
    monkeypatch.undo()
    render.add_images(corpus, size=48, cameras=("agentview",), assets=assets, overwrite=True)
    with h5py.File(corpus) as file:
        assert file["data/demo_1/obs/agentview_rgb"].shape == (3, 48, 48, 3) and "eye_in_hand_rgb" not in file["data/demo_1/obs"]


def test_images_into_a_wrong_file(corpus, drawer_task, assets, tmp_path):
    with pytest.raises(UserError, match="none.hdf5: no such file"):
        render.add_images(tmp_path / "none.hdf5")
    with h5py.File(tmp_path / "foreign.hdf5", "w") as file:
        file["x"] = 1
    with pytest.raises(UserError, match="foreign.hdf5: foreign layout"):
        render.add_images(tmp_path / "foreign.hdf5")
    with pytest.raises(UserError, match="no renderer 'vulkan'"):
        render.add_images(corpus, renderer="vulkan", assets=assets)
    other = "libero:0" if drawer_task.assets.startswith("standin") else "standin:0"
    with h5py.File(corpus, "a") as file:
        file["data"].attrs["assets"] = other
    with pytest.raises(UserError, match="was made on .*: pass .*--assets"):
        render.add_images(corpus, assets=assets)
    with h5py.File(corpus, "a") as file:
        file["data"].attrs["bddl_file_name"] = "bddl_files/libero_goal/fly_to_the_moon.bddl"
    with pytest.raises(UserError, match="corpus.hdf5: unknown task"):
        render.add_images(corpus, assets=assets)
    assert check_file(corpus) == []
