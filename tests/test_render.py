"""common/libero/renderers.py on a tiny scene: colours against OpenGL's lighting equation by hand, orientation, batches, error lines."""

import os
import subprocess
import sys

import mujoco
import numpy as np
import pytest

from common.cli import UserError
from common.libero import renderers

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
    return renderers.make_renderer(model, ("top", "front"), 128, 128).render(np.zeros((1, 3)))


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
    renderer = renderers.make_renderer(model, ("top", "front"), 64, 48)
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
    one, three = (renderers.make_renderer(model, ("top",), 50, 50, threads=n).render(qpos)["top"] for n in (1, 3))
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
    renderer = renderers.make_renderer(model, ("top",), 128, 128)
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


def test_error_lines(model):
    with pytest.raises(UserError, match="no camera 'side' in this model; choose from top, front"):
        renderers.make_renderer(model, ("side",))
    with pytest.raises(UserError, match="no renderer 'vulkan'; choose from warp, gl"):
        renderers.make_renderer(model, ("top",), renderer="vulkan")
    with pytest.raises(UserError, match="choose 1 to 4096"):
        renderers.make_renderer(model, ("top",), width=0)
    with pytest.raises(ValueError, match=r"not \(B, 3\)"):
        renderers.make_renderer(model, ("top",)).render(np.zeros(3))
    with pytest.raises(UserError, match="not recorded: name it with --renderer"):
        renderers.make_renderer(model, ("top",), renderer="unknown")
    assert renderers.available() == (True, "")
    assert renderers.available("vulkan") == (False, "no renderer 'vulkan'; choose from warp, gl")


def test_unwritable_cache_and_quiet_start(tmp_path):
    """In a process of its own: nothing is printed at the start, kernels go to our cache folder, an unwritable one is one warning."""
    code = "from common.libero import renderers; print(renderers.available())"
    path = {**os.environ, "PYTHONPATH": os.getcwd()}

    def run(cache):
        environment = {**path, "RL_DATA_ENGINE_CACHE": str(cache), "TMPDIR": str(tmp_path)}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    good = run(tmp_path / "cache")
    assert (good.stdout, good.stderr) == ("(True, '')\n", "") and (tmp_path / "cache" / "warp").is_dir()
    (tmp_path / "file").write_text("")
    bad = run(tmp_path / "file")  # a file where the folder should be
    assert bad.stdout == "(True, '')\n" and bad.stderr.count("\n") == 1 and "set RL_DATA_ENGINE_CACHE" in bad.stderr


NO_GL = """
import ctypes, ctypes.util

find, load = ctypes.util.find_library, ctypes.CDLL.__init__
ctypes.util.find_library = lambda name: None if "GL" in name or name == "OSMesa" else find(name)


def load_others(self, name, *args, **kwargs):
    if "GL" in str(name) or "OSMesa" in str(name):
        raise OSError(f"{name}: cannot open shared object file")
    load(self, name, *args, **kwargs)


ctypes.CDLL.__init__ = load_others
"""


@pytest.mark.parametrize("gl", ["egl", "disabled"])
def test_without_the_gl_library_that_is_asked_for(tmp_path, gl):
    """MUJOCO_GL as LIBERO's instructions have it, on a machine without GL: tasks build, pictures come from the ray tracer, one line."""
    (tmp_path / "sitecustomize.py").write_text(NO_GL)
    code = """if True:
        from common.libero import build
        from common.libero.renderers import available, make_renderer
        from common.libero.standins import standin_assets
        from common.suites import find_task
        build.NUM_TRAIN_STATES = 1
        task = build.build_task(find_task("libero_goal/0"), standin_assets())
        picture = make_renderer(task.model, ("agentview",), 16, 16).render(task.train_states[:, 1 : 1 + task.model.nq])["agentview"]
        print(picture.shape, available()[0], available("gl"))
    """
    env = os.environ | {"MUJOCO_GL": gl, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "(1, 16, 16, 3) True (False, \"MuJoCo's GL renderer does not start" in result.stdout, result.stderr
    said = [line for line in result.stderr.splitlines() if "MUJOCO_GL" in line]
    assert [f"MUJOCO_GL={gl} does not work here" in line for line in said] == [True] * (gl != "disabled")
    assert "Traceback" not in result.stderr


def test_agrees_with_gl(model, gl, tmp_path):
    """In a process of its own: which GL library MuJoCo takes is decided when it is imported."""
    qpos = np.array([[0, 0, 0], [0.3, 0.2, -0.2]], float)
    code = """if True:
        import sys, mujoco, numpy as np
        from common.libero import renderers
        model = mujoco.MjModel.from_xml_string(sys.stdin.read())
        np.savez(sys.argv[1], **renderers.make_renderer(model, ("top", "front"), 128, 128, renderer="gl").render(np.array(%r)))
    """
    call = [sys.executable, "-c", code % qpos.tolist(), str(tmp_path / "theirs.npz")]
    subprocess.run(call, input=SCENE, env=os.environ | {"MUJOCO_GL": gl}, text=True, check=True)
    ours, theirs = renderers.make_renderer(model, ("top", "front"), 128, 128).render(qpos), np.load(tmp_path / "theirs.npz")
    assert set(theirs) == set(ours)
    for name in ours:
        difference = np.abs(ours[name].astype(int) - theirs[name])
        assert np.median(difference) <= 1 and difference.mean() < 3  # edges differ: OpenGL smooths them
