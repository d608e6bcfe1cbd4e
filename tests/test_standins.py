"""The stand-in assets: written whole, LIBERO's names and numbers, at rest from official init states, hollow, and chosen as documented."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import mujoco
import numpy as np
import pytest

from benchmarks import standins as benchmark
from common.libero import build, make_env, standins, tasks
from common.libero.goals import predicate_holds
from common.libero.original import bddl_file, official_init_states
from common.libero.standin_things import small_objects
from common.libero.step import NO_OP
from common.suites import task_names

ROOT = Path(__file__).resolve().parent.parent
# One task of each of LIBERO's five scenes, which together hold 26 of its 33 categories of things.
SCENES = {
    "libero_spatial/0": (48, 43, "akita_black_bowl plate glazed_rim_porcelain_ramekin cookies wooden_cabinet flat_stove"),
    "libero_object/3": (58, 51, "bbq_sauce ketchup basket"),
    "libero_10/9": (24, 22, "microwave white_yellow_mug porcelain_mug"),
    "libero_10/0": (65, 57, "alphabet_soup cream_cheese tomato_sauce basket"),
    "libero_10/5": (23, 21, "desk_caddy black_book white_yellow_mug"),
}
# Facts of LIBERO's assets: mass (kg) and, where it has one, a region's centre and half size (m) in the object's frame.
MASSES = {"akita_black_bowl": 0.0056, "plate": 0.0115, "basket": 0.1361, "alphabet_soup": 0.0259, "ketchup": 0.0232, "black_book": 0.0425}
REGIONS = {
    "basket_1_contain_region": ([0.0, 0.0, 0.07185], [0.06108, 0.06108, 0.06949]),
    "wooden_cabinet_1_middle_region": ([0.00328, 0.01128, 0.1169], [0.02993, 0.07561, 0.10224]),
    "microwave_1_heating_region": ([0.0, 0.01, 0.096], [0.12, 0.0835, 0.08]),
    "desk_caddy_1_front_contain_region": ([-0.03102, -0.00064, 0.04054], [0.02775, 0.03595, 0.06216]),
}
JOINTS = {  # axis in the body's frame, range, damping
    "wooden_cabinet_1_top_level": ([0, 1, 0], [-0.16, 0.01], 50.0),
    "flat_stove_1_button": ([0, 0, 1], [-0.005, 2.1], 1.0),
    "microwave_1_microjoint": ([0, 0, 1], [-2.094, 0.0], 0.5),
}


def build_tasks(folder: Path, task_ids, assets: str) -> dict[str, tasks.Task]:
    """Tasks built in a process of their own, with few training states and outside the cache: 1 s each on the stand-ins."""
    code = """if True:
        import sys
        from pathlib import Path
        from common.libero import build, tasks
        from common.libero.assets import find_assets
        from common.suites import find_task
        build.NUM_TRAIN_STATES = 2
        assets = find_assets(sys.argv[1])
        for task_id, path in zip(sys.argv[2::2], sys.argv[3::2]):
            tasks.write_task(Path(path), build.build_task(find_task(task_id), assets))
    """
    paths = {task_id: folder / f"{task_id.replace('/', '-')}.npz" for task_id in task_ids}
    arguments = [str(x) for pair in paths.items() for x in pair]
    subprocess.run(
        [sys.executable, "-c", code, assets, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True
    )
    return {task_id: tasks._read_task(path) for task_id, path in paths.items()}


@pytest.fixture(scope="session")
def standin_tasks(tmp_path_factory) -> dict[str, tasks.Task]:
    """The tasks of SCENES, built on the stand-ins."""
    return build_tasks(tmp_path_factory.mktemp("standins"), SCENES, "standin")


@pytest.fixture(scope="session")
def real_tasks(tmp_path_factory, real_assets) -> dict[str, tasks.Task]:
    """Two of them, built on LIBERO's own assets."""
    return build_tasks(tmp_path_factory.mktemp("real"), ["libero_spatial/0", "libero_10/9"], real_assets)


def names(model: mujoco.MjModel) -> dict[str, list[str]]:
    """Names of all bodies, joints, sites, cameras and actuators."""
    counts = {"body": model.nbody, "joint": model.njnt, "site": model.nsite, "cam": model.ncam, "actuator": model.nu}
    return {kind: sorted(getattr(model, kind)(i).name for i in range(n)) for kind, n in counts.items()}


def site_in_root(task: tasks.Task, site: int) -> tuple[np.ndarray, np.ndarray]:
    """A site's position and rotation in the frame of the object or fixture that carries it, all joints at zero."""
    data = mujoco.MjData(task.model)
    mujoco.mj_kinematics(task.model, data)
    root = task.model.body_rootid[task.model.site_bodyid[site]]
    turn = data.xmat[root].reshape(3, 3)
    return turn.T @ (data.site_xpos[site] - data.xpos[root]), turn.T @ data.site_xmat[site].reshape(3, 3)


# ---------------------------------------------------------------------------------------------- files


def test_written_whole_by_two_processes(tmp_path, monkeypatch):
    """Two processes at once write the same tree, and leave nothing beside it; a failed one leaves nothing at all."""
    code = "from common.libero.standins import standin_assets; print(standin_assets())"
    env = os.environ | {"RL_DATA_ENGINE_CACHE": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (p.communicate()[0].strip() for p in processes)
    assert first == second and [p.name for p in (tmp_path / "standins").iterdir()] == [Path(first).name]
    assert standins.is_standin(Path(first)) and (Path(first) / "articulated_objects" / "microwave.xml").is_file()
    assert not list(Path(first).rglob("*.msh")) and not list(Path(first).rglob("*.stl")) and not list(Path(first).rglob("*.obj"))

    def full_disk(folder):
        (folder / "scenes").mkdir()
        raise OSError("no space left")

    monkeypatch.setenv("RL_DATA_ENGINE_CACHE", str(tmp_path / "full"))
    monkeypatch.setattr(standins, "write_assets", full_disk)
    with pytest.raises(OSError, match="no space left"):
        standins.standin_assets()
    assert not list((tmp_path / "full" / "standins").iterdir())


def test_the_folder_names_every_file_that_makes_them(tmp_path, monkeypatch):
    """A change in any module that the stand-ins are made by gives them another folder in the cache."""
    sources = sorted(Path(standins.__file__).parent.glob("standin*.py"))
    for source in sources:
        imported = [node.module for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.ImportFrom)]
        made_by = {name for name in imported if name.startswith("common.")} - {"common.cli"}
        assert made_by <= {f"common.libero.{s.stem}" for s in sources}, source.name
        shutil.copy(source, tmp_path)
    before = standins.generator_fingerprint()
    monkeypatch.setattr(standins, "__file__", str(tmp_path / "standins.py"))
    assert standins.generator_fingerprint() == before and len(sources) == 4
    for source in sources:
        (tmp_path / source.name).write_text(source.read_text().replace("0", "1"))
        assert standins.generator_fingerprint() != before
        shutil.copy(source, tmp_path)


def test_every_file_that_libero_asks_for():
    """The stand-ins have a file for each category of the 130 tasks' BDDL files, under the name that LIBERO's class opens."""
    folder, found = standins.standin_assets(), set()
    for suite, names in task_names().items():
        for index in range(len(names)):
            text = bddl_file(suite, index).read_text()
            for section in ("(:fixtures", "(:objects"):
                body = text[text.index(section) + len(section) :]
                found |= {line.split(" - ")[1].strip() for line in body[: body.index(")")].splitlines() if " - " in line}
    stems = {path.stem for path in folder.rglob("*.xml")}
    # what BDDL calls a fixture and is part of a scene
    assert found - stems == {"table", "floor", "kitchen_table", "living_room_table", "study_table"}
    assert len(found & stems) == 33


# ---------------------------------------------------------------------------------------------- names and numbers


@pytest.mark.parametrize("task_id", SCENES)
def test_names_and_numbers(standin_tasks, task_id):
    """Dimensions, official init states, categories, masses, regions and joints against facts of LIBERO's assets."""
    task = standin_tasks[task_id]
    nq, nv, categories = SCENES[task_id]
    assert (task.model.nq, task.model.nv) == (nq, nv) and task.init_states.shape == (50, 1 + nq + nv)
    assert task.assets.startswith("standin:") and task.model.nmesh > 0  # the robot's meshes come with robosuite
    assert set(categories.split()) <= {o.category for o in task.objects.values()}
    for info in task.objects.values():
        if info.category in MASSES:
            assert task.model.body_subtreemass[info.body] == pytest.approx(MASSES[info.category], rel=0.02)
    for name, (centre, size) in REGIONS.items():
        if name in task.sites:
            np.testing.assert_allclose(site_in_root(task, task.sites[name].site)[0], centre, atol=1e-3)
            np.testing.assert_allclose(task.sites[name].size, size, atol=1e-6)
    for i in range(task.model.njnt):
        if (name := task.model.joint(i).name) in JOINTS:
            axis, limits, damping = JOINTS[name]
            joint = task.model.joint(i)
            np.testing.assert_allclose(joint.axis, axis)
            np.testing.assert_allclose(joint.range, limits)
            assert task.model.dof_damping[joint.dofadr[0]] == damping
    solid = (task.model.geom_contype | task.model.geom_conaffinity) > 0
    for info in task.objects.values():  # what collides is in group 0, what is seen in group 1
        body = task.model.body_rootid[task.model.geom_bodyid] == info.body
        assert (task.model.geom_group[body & solid] == 0).all() and (task.model.geom_group[body & ~solid] == 1).all()
        assert (body & ~solid).any() and set(info.geoms) == set(np.flatnonzero(body & solid))


@pytest.mark.parametrize("task_id", ["libero_spatial/0", "libero_10/9"])
def test_equals_the_real_model(standin_tasks, real_tasks, task_id):
    """Against LIBERO's own assets: the same names in the same order, masses within 3 %, centres of mass and regions within millimetres."""
    real, ours = real_tasks[task_id], standin_tasks[task_id]
    assert real.assets.startswith("libero:") and names(real.model) == names(ours.model)
    assert [real.model.joint(i).name for i in range(real.model.njnt)] == [ours.model.joint(i).name for i in range(ours.model.njnt)]
    assert [(p.name, p.args, p.kind, p.size, p.qpos, p.sign, p.threshold) for p in real.goal] == [
        (p.name, p.args, p.kind, p.size, p.qpos, p.sign, p.threshold) for p in ours.goal
    ]
    datas = []
    for task in (real, ours):
        datas.append(mujoco.MjData(task.model))
        mujoco.mj_forward(task.model, datas[-1])
    for name, info in real.objects.items():
        masses = [t.model.body_subtreemass[t.objects[name].body] for t in (real, ours)]
        assert masses[1] == pytest.approx(masses[0], rel=0.03), name
        centres = [d.subtree_com[t.objects[name].body] - d.xpos[t.objects[name].body] for t, d in zip((real, ours), datas, strict=True)]
        np.testing.assert_allclose(centres[1], centres[0], atol=0.01, err_msg=name)
        assert ours.objects[name].category == info.category and ours.objects[name].fixture == info.fixture
    for name, site in real.sites.items():
        assert site.size == ours.sites[name].size
        for a, b in zip(site_in_root(real, site.site), site_in_root(ours, ours.sites[name].site), strict=True):
            np.testing.assert_allclose(b, a, atol=1e-3, err_msg=name)
    friction = [{tuple(t.model.geom_friction[g]) for o in t.objects.values() for g in o.geoms} for t in (real, ours)]
    assert friction[0] == friction[1]


# ---------------------------------------------------------------------------------------------- physics


# How far objects rise (mm) from LIBERO's official states, which start them in the air or in the table, until they are at rest on
# LIBERO's assets.
RISES = {
    "libero_spatial/0": dict(akita_black_bowl=-71.6, cookies=-60.6, glazed_rim_porcelain_ramekin=-70.7, plate=-67.5),
    "libero_object/3": dict(bbq_sauce=19.6, basket=-39.6, chocolate_pudding=-21.9, ketchup=37.4, salad_dressing=37.7, cream_cheese=8.9),
    "libero_10/9": dict(porcelain_mug=-72.4, white_yellow_mug=-69.9),
    "libero_10/0": dict(alphabet_soup=15.2, tomato_sauce=-4.8, ketchup=29.2, orange_juice=26.5, milk=26.5, butter=5.5, basket=-47.8),
    "libero_10/5": dict(black_book=-54.0, white_yellow_mug=-51.8),
}


def test_as_libero_measures(real_assets):
    """All 33 objects and fixtures against LIBERO's: mass, centre of mass, extent, inertia, and the regions that goals refer to."""
    pairs = benchmark.compare(Path(real_assets))
    assert len(pairs) == 33
    for name, (real, ours) in pairs.items():
        assert ours.mass == pytest.approx(real.mass, rel=0.01), name
        assert np.linalg.norm(ours.centre - real.centre) < (0.01 if name == "wooden_two_layer_shelf" else 0.0055), name
        assert np.abs(ours.box - real.box).max() < 0.006, name
        slender = name in ("alphabet_soup", "tomato_sauce", "wine_bottle")  # about their axis
        np.testing.assert_allclose(ours.inertia, real.inertia, rtol=0.35 if slender else 0.12, err_msg=name)
        assert ours.regions.keys() == real.regions.keys()
        for site, region in real.regions.items():
            np.testing.assert_allclose(ours.regions[site], region, atol=1e-4, err_msg=site)
    wide = benchmark.table({"butter": pairs["butter"]}).splitlines()
    assert wide[2] == "| butter | 5.2 | 5.2 | 0.0 | 0.0 | 0.99 to 0.99 |  | 1 | 1 |" and wide[0].count("|") == wide[2].count("|")


@pytest.mark.parametrize("task_id", SCENES)
def test_settles(standin_tasks, task_id):
    """From official init states everything comes to rest upright, at the height where it does on LIBERO's assets."""
    task = standin_tasks[task_id]
    env = make_env(task, num_envs=4)
    chosen = [0, 12, 25, 37]
    env.reset(options={"init_state": chosen})
    before = task.init_states[chosen, 1:]
    for _ in range(20):
        env.step(np.tile(NO_OP, (4, 1)))
    after = env.get_state()[:, 1:]
    env.step(np.tile(NO_OP, (4, 1)))
    later = env.get_state()[:, 1:]
    env.close()
    assert np.isfinite(after).all()
    for name, info in task.objects.items():
        if info.joint_qpos is None:
            joints = [task.model.jnt_qposadr[j] for j in info.joints]
            np.testing.assert_allclose(after[:, joints], before[:, joints], atol=0.01, err_msg=name)
            continue
        i = info.joint_qpos
        moved = 1e3 * (after[:, i : i + 3] - before[:, i : i + 3])
        np.testing.assert_allclose(moved[:, 2], RISES[task_id].get(info.category, moved[:, 2]), atol=1.0, err_msg=name)
        assert np.linalg.norm(moved[:, :2], axis=1).max() < 40, (name, moved)  # a bowl that falls on the plate's rim slides down
        assert np.linalg.norm(later[:, i : i + 3] - after[:, i : i + 3], axis=1).max() < 0.002, name  # in 0.05 s
        dots = np.abs((after[:, i + 3 : i + 7] * before[:, i + 3 : i + 7]).sum(1))
        assert np.degrees(2 * np.arccos(np.clip(dots, 0, 1))).max() < 15, name


def test_rest_on_two_asset_sets(standin_tasks, monkeypatch):
    """Of a task, positions of what is free and of joints, and speeds; of several, how far apart two sets of them are."""
    task = standin_tasks["libero_spatial/0"]
    monkeypatch.setattr(benchmark, "load_task", lambda task_id, assets: task)
    positions, joints, speeds = benchmark.rest("libero_spatial/0", "standin", 2)
    free = [o.joint_qpos for o in task.objects.values() if o.joint_qpos is not None]
    assert positions.shape == (2, len(free), 3) and speeds.shape == (2, len(free)) and (speeds < 0.01).all()
    np.testing.assert_allclose(positions[:, :, :2], np.stack([task.init_states[[0, 25]][:, 1 + i : 3 + i] for i in free], 1), atol=0.06)
    assert joints.shape == (2, 4) and np.abs(joints).max() < 0.01  # three drawers and a knob

    shift = np.zeros((2, 2, 3))
    shift[0, 0] = 0.003, 0.004, 0.0  # 5 mm aside
    shift[1, 1] = 0.0, 0.0, -0.002  # 2 mm lower
    rests = {"real": (np.zeros((2, 2, 3)), np.zeros((2, 1)), np.zeros((2, 2))), "standin": (shift, np.full((2, 1), -0.001), np.eye(2))}
    monkeypatch.setattr(benchmark, "rest", lambda task_id, assets, n: rests[assets])
    lines = benchmark.settled(["libero_goal/0"], "real", 2).splitlines()
    assert lines[2:] == [f"| {name} | 1 | 4 | 0.0 | 3.5 | 5.0 | 0.0 | 1.4 | 2.0 | 1.0 | 0 | 2 |" for name in ("libero_goal", "all")]


def drop(task: tasks.Task, name: str, position: np.ndarray, seconds: float = 1.5) -> mujoco.MjData:
    """Put an object at rest at `position` (world, m), everything else as in the first official state, and let it fall."""
    data = mujoco.MjData(task.model)
    data.qpos[:], data.qvel[:] = task.init_states[0, 1 : 1 + task.model.nq], 0
    i = task.objects[name].joint_qpos
    data.qpos[i : i + 3] = position
    gravity = [j for j in range(task.model.nv) if j in task.arm_dof]
    while data.time < seconds:
        mujoco.mj_step1(task.model, data)
        data.qfrc_applied[gravity] = data.qfrc_bias[gravity]  # the arm stays where it is
        mujoco.mj_step2(task.model, data)
    return data


def test_hollow_basket_and_drawer(standin_tasks):
    """A can dropped over the basket ends up in its region, one beside it does not; the same with a bowl and an open drawer."""
    task = standin_tasks["libero_10/0"]
    in_basket = next(p for p in task.goal if p.args[0] == "alphabet_soup_1")
    site = task.sites["basket_1_contain_region"].site
    settled = drop(task, "alphabet_soup_1", np.array([-0.4, -0.4, 1.0]))
    assert not predicate_holds(in_basket, settled, task.model)
    over = settled.site_xpos[site] + [0, 0, 0.15]
    assert predicate_holds(in_basket, drop(task, "alphabet_soup_1", over), task.model)

    task = standin_tasks["libero_spatial/0"]
    model, bowl = task.model, task.objects["akita_black_bowl_1"]
    data = mujoco.MjData(model)
    drawer = model.joint("wooden_cabinet_1_top_level")
    data.qpos[:] = task.init_states[0, 1 : 1 + model.nq]
    data.qpos[drawer.qposadr[0]] = -0.155
    mujoco.mj_forward(model, data)
    site = task.sites["wooden_cabinet_1_top_region"].site
    data.qpos[bowl.joint_qpos : bowl.joint_qpos + 3] = data.site_xpos[site] + data.site_xmat[site].reshape(3, 3) @ [0.06, 0, 0]
    z = data.site_xpos[site][2]
    data.qpos[bowl.joint_qpos + 2] = z + 0.06
    while data.time < 1.0:
        mujoco.mj_step(model, data)
    floor = z - 0.0299  # of the region: half its height below its centre
    assert floor - 0.01 < data.xpos[bowl.body][2] < floor + 0.02  # inside, on the drawer's bottom
    inside = tasks.Predicate("in", (), "contain", site=site, body=bowl.body, size=task.sites["wooden_cabinet_1_top_region"].size)
    assert predicate_holds(inside, data, task.model)


@pytest.mark.parametrize(
    ("name", "radius", "height"),
    [("akita_black_bowl", 0.045, 0.0068), ("white_yellow_mug", 0.035, 0.0052), ("glazed_rim_porcelain_ramekin", 0.033, 0.0073)],
)
def test_hollow_crockery(name, radius, height):
    """A small ball dropped into a bowl, mug or ramekin rolls to its bottom and stays; nothing of the thing is within its cavity."""
    (thing,) = (t for t in small_objects() if Path(t.file).stem == name)
    root = standins.thing_xml(thing)
    world = root.find("worldbody")
    body = world.find("./body/body[@name='object']")
    x = -0.0182 if "mug" in name else 0.0
    ball = f"""<mujoco><option cone="elliptic" impratio="20"/><worldbody><geom type="plane" size="1 1 .1"/>
        <body name="ball" pos="{x + 0.01} 0 0.2"><freejoint/><geom type="sphere" size="0.008" density="500"/></body></worldbody></mujoco>"""
    scene = ET.fromstring(ball)
    scene.append(root.find("asset"))
    body.set("pos", "0 0 0")
    scene.find("worldbody").append(body)
    model = mujoco.MjModel.from_xml_string(ET.tostring(scene, encoding="unicode"))
    data = mujoco.MjData(model)
    while data.time < 2.0:
        mujoco.mj_step(model, data)
    position = data.body("ball").xpos - [x, 0, 0]
    assert np.hypot(*position[:2]) < radius - 0.008 and position[2] == pytest.approx(height + 0.008, abs=0.012)


def test_articulated_parts_move(standin_tasks):
    """A push of 20 N opens a drawer to its stop, and a torque turns the knob: LIBERO's own predicates say so."""
    task = standin_tasks["libero_spatial/0"]
    data = mujoco.MjData(task.model)
    data.qpos[:] = task.init_states[0, 1 : 1 + task.model.nq]
    drawer, knob = task.model.joint("wooden_cabinet_1_top_level"), task.model.joint("flat_stove_1_button")
    while data.time < 1.0:
        data.qfrc_applied[drawer.dofadr[0]], data.qfrc_applied[knob.dofadr[0]] = -20.0, 2.0
        mujoco.mj_step(task.model, data)
    assert data.qpos[drawer.qposadr[0]] < -0.14 and data.qpos[knob.qposadr[0]] > 0.5
    moved = data.xpos[task.model.body("wooden_cabinet_1_cabinet_top").id] - data.xpos[task.model.body("wooden_cabinet_1_cabinet_bottom").id]
    assert np.linalg.norm(moved[:2]) > 0.13


# ---------------------------------------------------------------------------------------------- textures and states


def test_small_textures_keep_their_colour_space(tmp_path, monkeypatch):
    """A texture whose PNG is marked as sRGB is marked so after it was made smaller, and others are not."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    monkeypatch.setenv("RL_DATA_ENGINE_CACHE", str(tmp_path / "cache"))
    marked = PngInfo()
    marked.add(b"sRGB", b"\x00")
    picture = Image.new("RGB", (2 * build.TEXTURE_SIZE, 4 * build.TEXTURE_SIZE), (10, 100, 200))
    for name, chunks in (("plain.png", None), ("srgb.png", marked)):
        picture.save(tmp_path / name, pnginfo=chunks)
        xml = build._shrink(f'<mujoco><asset><texture name="t" type="2d" file="{tmp_path / name}"/></asset></mujoco>')
        file = xml.split('file="')[1].split('"')[0]
        with Image.open(file) as small:
            assert small.size == (build.TEXTURE_SIZE // 2, build.TEXTURE_SIZE)
            assert ("srgb" in small.info) == (chunks is not None)


def test_official_states_are_those_of_the_suite(standin_tasks):
    np.testing.assert_array_equal(standin_tasks["libero_10/9"].init_states, official_init_states("libero_10", 9))
