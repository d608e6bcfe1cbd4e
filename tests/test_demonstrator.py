"""The scripted demonstrator: geometry and flows against closed forms, and short demonstrations that must succeed and replay."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import mujoco
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from scipy.spatial.transform import Rotation

from common.cli import UserError
from common.data import read_episodes
from common.demos import articulate, cache, collection, grasps, rehearsal
from common.demos.articulate import Articulate, joint_motion
from common.demos.attempts import Attempt, perform
from common.demos.collection import collect, load_or_collect, make_file
from common.demos.demonstrator import SKILLS, Demonstrator, Step, Strategy, agenda, unsettled
from common.demos.geometry import (
    CELL,
    UP,
    columns,
    hand_rotation,
    inside_solids,
    nearby_points,
    rest,
    rotation_vector,
    surface_points,
    world_points,
)
from common.demos.grasps import PAD_REACH, find_grasps, own_grasps
from common.demos.motion import CLOSE, DIRECTIONS, PATHS, PlanError, detour, follow, funnel
from common.demos.pick_place import PickPlace
from common.demos.places import closed_later, find_drop, slack
from common.demos.rehearsal import MAX_STRATEGIES, Trials, next_trial
from common.libero import make_env
from common.libero.goals import predicate_holds
from common.libero.tasks import Predicate

PULL = Strategy("contact middle, path near", {"contact": "middle", "path": "near"})


@pytest.fixture
def pulling(drawer_task, monkeypatch):
    """The drawer task with a repertoire of one strategy, so that nothing has to be rehearsed."""
    monkeypatch.setitem(rehearsal._strategies, (drawer_task.id, drawer_task.assets), [PULL])
    return drawer_task


def box(half, centre=(0.0, 0.0, 0.0)):
    """Points on the surface of a box."""
    model = mujoco.MjModel.from_xml_string(f'<mujoco><worldbody><geom type="box" size="{" ".join(map(str, half))}"/></worldbody></mujoco>')
    return surface_points(model, [0])[0][1] + np.asarray(centre)


def test_rotation_vector_agrees_with_scipy():
    rotations = Rotation.random(50, random_state=0)
    ours = [rotation_vector(r.as_matrix()) for r in rotations]
    np.testing.assert_allclose(ours, rotations.as_rotvec(), atol=1e-9)
    np.testing.assert_allclose(rotation_vector(np.eye(3)), 0.0)


def test_funnel_is_zero_at_the_goal_and_climbs_when_far_from_the_axis():
    assert np.allclose(funnel(np.zeros(3), UP, 0.2, 0.1), 0.0)
    far = funnel(np.array([0.3, 0.0, 0.0]), UP, 0.2, 0.1)
    np.testing.assert_allclose(far, [-0.3 * 0.2, 0.0, 0.2])  # a fifth of the sideways way while it has to climb
    np.testing.assert_allclose(funnel(np.array([0.3, 0.0, 0.2]), UP, 0.2, 0.1), [-0.3, 0.0, 0.0])


@pytest.mark.parametrize("out", [UP, DIRECTIONS["left"], np.array([0.0, -0.966, 0.259])])
@pytest.mark.parametrize("name", PATHS)
def test_every_path_arrives_along_its_axis_from_anywhere(name, out):
    rng = np.random.default_rng(0)
    for start in rng.uniform(-0.3, 0.3, (20, 3)):
        path = follow(start, out, detour(name, out), 0.08, 0.04)
        assert np.linalg.norm(path[-1]) < 0.012
        along = path @ out
        across = np.linalg.norm(path - along[:, None] * out, axis=1)
        outside = across > 0.04  # sideways motion happens at least most of the height away from what is approached
        arrived = np.maximum.accumulate(along > 0.05)
        assert (along[outside & arrived] > 0.02).all()


def test_detours_are_large():
    start = np.array([-0.25, 0.0, 0.2])
    reach = {name: follow(start, UP, detour(name, UP), 0.08, 0.04) for name in PATHS}
    assert reach["left"][:, 1].max() > 0.08 and reach["right"][:, 1].min() < -0.08
    assert reach["far"][:, 0].max() > 0.04 and reach["over"][:, 2].max() > reach["direct"][:, 2].max() + 0.05


def test_a_box_is_grasped_across_its_middle_and_no_wider_than_the_hand():
    narrow = box((0.02, 0.05, 0.025))
    grasps = find_grasps(narrow, narrow, hand_rotation(np.array([1.0, 0.0, 0.0]), -UP), 0.02, -0.02)
    assert grasps
    for g in grasps:
        assert abs(g.position[0]) < CELL and abs(g.width - 0.04) <= CELL
        assert g.position[2] == pytest.approx(0.025 - 0.02 + PAD_REACH, abs=1e-9)
        np.testing.assert_allclose(g.rotation[:, 2], -UP)
    assert not find_grasps(narrow, narrow, hand_rotation(np.array([0.0, 1.0, 0.0]), -UP), 0.02, -0.02)


def test_a_wall_where_a_finger_has_to_go_rules_a_grasp_out():
    thing, wall = box((0.02, 0.02, 0.025)), box((0.005, 0.1, 0.1), (0.045, 0.0, 0.0))
    across, along = (hand_rotation(np.array(axis), -UP) for axis in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]))
    assert find_grasps(thing, thing, across, 0.02, -0.02)
    assert not find_grasps(thing, np.concatenate([thing, wall]), across, 0.02, -0.02)
    assert find_grasps(thing, np.concatenate([thing, box((0.1, 0.005, 0.1), (0.0, 0.2, 0.0))]), along, 0.02, -0.02)


def put_down(task, kind, region, obj="akita_black_bowl_1"):
    """The predicate that an object is in or on a region of a scene."""
    site, body = task.sites[region], task.objects[obj].body
    return Predicate("in" if kind == "contain" else "on", (obj, region), kind, site=site.site, body=body, size=site.size)


@pytest.mark.parametrize("kind, region", [("contain", "wooden_cabinet_1_top_region"), ("under", "wine_rack_1_top_region")])
def test_the_slack_of_a_place_has_the_sign_of_the_goals_predicate(drawer_task, kind, region):
    p, rng = put_down(drawer_task, kind, region), np.random.default_rng(0)
    model, data = drawer_task.model, mujoco.MjData(drawer_task.model)
    data.qpos[:] = drawer_task.init_states[0, 1 : 1 + model.nq]
    mujoco.mj_kinematics(model, data)
    centre, frame = data.site_xpos[p.site].copy(), data.site_xmat[p.site].reshape(3, 3).copy()
    origins = centre + rng.uniform(-0.15, 0.15, (400, 3))
    inside = slack(p, centre, frame, origins)
    free = drawer_task.objects["akita_black_bowl_1"].joint_qpos
    for origin, expected in zip(origins, inside > 0.0, strict=True):
        data.qpos[free : free + 3] = origin
        mujoco.mj_kinematics(model, data)
        assert predicate_holds(p, data, model) == expected
    assert 3 < (inside > 0.0).sum() < 200


def test_a_drop_clears_the_walls_around_it(drawer_task):
    """Into an open drawer: the box must be between its walls, wherever it was before, and turned as it was or square with it."""
    p = put_down(drawer_task, "contain", "wooden_cabinet_1_top_region")
    model, data = drawer_task.model, mujoco.MjData(drawer_task.model)
    data.qpos[:] = drawer_task.init_states[0, 1 : 1 + model.nq]
    (joint,) = drawer_task.sites["wooden_cabinet_1_top_region"].joints
    cargo, hand = box((0.05, 0.03, 0.02)), box((0.01, 0.01, 0.05), (0.0, 0.0, 0.09))
    grip = hand_rotation(DIRECTIONS["left"], -UP)
    mujoco.mj_kinematics(model, data)
    with pytest.raises(PlanError):  # closed: the cabinet is above it
        find_drop(drawer_task, data, p, cargo, hand, np.eye(3), data.site_xpos[p.site][2], grip)
    data.qpos[model.jnt_qposadr[joint]] = model.jnt_range[joint][0]
    mujoco.mj_kinematics(model, data)
    tall, holder = box((0.018, 0.018, 0.07)), box((0.02, 0.02, 0.04), (0.0, 0.0, 0.12))
    origin, turn = find_drop(drawer_task, data, p, tall, holder, np.eye(3), 0.0, grip)  # leaned over: it would stand too high
    assert slack(p, data.site_xpos[p.site], data.site_xmat[p.site].reshape(3, 3), origin[None])[0] > 0.0 and 0.1 < turn[2, 2] < 0.7
    found = find_drop(drawer_task, data, p, cargo, hand, np.eye(3), 0.0, grip)
    origin, turn = found
    centre, frame = data.site_xpos[p.site], data.site_xmat[p.site].reshape(3, 3)
    assert slack(p, centre, frame, origin[None])[0] > 0.0
    others = [g for g in range(model.ngeom) if (model.geom_contype | model.geom_conaffinity)[g]]
    robot, own = model.body_rootid[model.site_bodyid[drawer_task.eef_site]], model.body_rootid[p.body]
    others = np.array([g for g in others if model.body_rootid[model.geom_bodyid[g]] not in (robot, own) and model.geom_aabb[g, 3] > 0])
    assert not inside_solids(model, data, others, cargo @ turn.T + origin, 0.0)


def test_a_drop_of_several_passes_over_spots_with_nothing_below(drawer_task):
    """Something that reaches far aside is held over nothing at some spots of the drawer, which leaves the others to choose from."""
    p = put_down(drawer_task, "contain", "wooden_cabinet_1_top_region")
    model, data = drawer_task.model, mujoco.MjData(drawer_task.model)
    data.qpos[:] = drawer_task.init_states[0, 1 : 1 + model.nq]
    (joint,) = drawer_task.sites["wooden_cabinet_1_top_region"].joints
    data.qpos[model.jnt_qposadr[joint]] = model.jnt_range[joint][0]
    mujoco.mj_kinematics(model, data)
    centre, frame = data.site_xpos[p.site], data.site_xmat[p.site].reshape(3, 3)
    cargo, hand = box((0.001, 0.001, 0.02), (0.14, 0.0, 0.0)), box((0.01, 0.01, 0.05), (0.0, 0.0, 0.09))
    grip = hand_rotation(DIRECTIONS["left"], -UP)
    origin, _ = find_drop(drawer_task, data, p, cargo, hand, np.eye(3), 0.0, grip, crowded=centre[:2])
    assert slack(p, centre, frame, origin[None])[0] > 0.0


def test_what_the_hand_has_no_room_to_put_down_falls_in(drawer_task):
    p = put_down(drawer_task, "contain", "wooden_cabinet_1_top_region")
    model, data = drawer_task.model, mujoco.MjData(drawer_task.model)
    data.qpos[:] = drawer_task.init_states[0, 1 : 1 + model.nq]
    (joint,) = drawer_task.sites["wooden_cabinet_1_top_region"].joints
    data.qpos[model.jnt_qposadr[joint]] = model.jnt_range[joint][0]
    mujoco.mj_kinematics(model, data)
    cargo, hand, bottom = box((0.03, 0.03, 0.02)), box((0.2, 0.2, 0.01)), 0.02  # wider than the drawer
    held = drawer_task, data, p, cargo, hand, np.eye(3), 0.0, hand_rotation(DIRECTIONS["left"], -UP)
    with pytest.raises(PlanError):
        find_drop(*held)
    origin, _ = find_drop(*held, fall=True)
    centre, frame = data.site_xpos[p.site], data.site_xmat[p.site].reshape(3, 3)
    assert slack(p, centre, frame, origin[None])[0] < 0.0
    under = nearby_points(drawer_task, data, centre, [model.body_rootid[p.body]])
    under = under[(np.abs(under - origin)[:, :2] < 0.03).all(1), 2].max()
    assert slack(p, centre, frame, np.array([[*origin[:2], under + bottom]]))[0] > 0.0


def test_the_names_of_an_objects_own_grasps_do_not_hang_on_how_it_rocks(drawer_task):
    bowl, data = next(o for o in drawer_task.objects.values() if not o.fixture), mujoco.MjData(drawer_task.model)
    data.qpos[:] = drawer_task.init_states[0, 1 : 1 + drawer_task.model.nq]
    found = []
    for tilt in ((1e-3, 0.0, 0.0), (0.0, 1e-3, 0.0)):
        w, x, y, z = Rotation.from_rotvec(tilt).as_quat(scalar_first=True)
        data.qpos[bowl.joint_qpos + 3 : bowl.joint_qpos + 7] = w, x, y, z
        mujoco.mj_kinematics(drawer_task.model, data)
        found.append(own_grasps(drawer_task, data, bowl))
    common = found[0].keys() & found[1].keys()
    assert len(common) > 5
    for name in common:
        np.testing.assert_allclose(found[0][name].rotation, found[1][name].rotation, atol=0.01)


def test_things_come_to_rest_on_a_height_map():
    rng = np.random.default_rng(0)
    cells, under = columns(box((0.011, 0.02, 0.015)), CELL)
    assert (under == -0.015).all() and len(cells) == len(np.unique(cells, axis=0)) == 7 * 11
    surface, spots = rng.uniform(0.0, 0.1, (40, 40)), rng.integers(10, 30, (20, 2))
    expected = [surface[i - 3 : i + 4, j - 5 : j + 6].max() + 0.015 for i, j in spots]
    np.testing.assert_array_equal(rest(cells, under, surface, spots), expected)


def test_what_is_put_beside_something_tall_comes_straight_down(drawer_task):
    model, data, objects = drawer_task.model, mujoco.MjData(drawer_task.model), drawer_task.objects
    bowl, plate, bottle = (objects[name] for name in ("akita_black_bowl_1", "plate_1", "wine_bottle_1"))
    p = Predicate("on", (bowl.name, plate.name), "ontop", body=bowl.body, target_body=plate.body)
    for beside in (False, True):
        data.qpos[:] = drawer_task.init_states[0, 1 : 1 + model.nq]
        data.qpos[plate.joint_qpos + 1] += 0.08  # away from the cabinet
        if beside:
            data.qpos[bottle.joint_qpos : bottle.joint_qpos + 2] = data.qpos[plate.joint_qpos : plate.joint_qpos + 2] + (0.0, 0.12)
        mujoco.mj_kinematics(model, data)
        skill = PickPlace(drawer_task, p, {"grasp": "left", "path": "direct"})
        skill.plan(data)
        assert skill.carry[0] > 0.15 if beside else skill.carry == PickPlace.CARRY


def test_what_goes_in_through_a_door_is_held_far_out_with_the_hand_leaning_in(drawer_task, monkeypatch):
    """The drawer is closed again, and then passes for a door."""
    model, data = drawer_task.model, mujoco.MjData(drawer_task.model)
    data.qpos[:] = drawer_task.init_states[0, 1 : 1 + model.nq]
    mujoco.mj_kinematics(model, data)
    into, out = put_down(drawer_task, "contain", "wooden_cabinet_1_top_region"), DIRECTIONS["near"]
    (joint,) = drawer_task.sites[into.args[1]].joints
    close = Predicate("close", (into.args[1],), "joint", qpos=(int(model.jnt_qposadr[joint]),))
    closing = dataclasses.replace(drawer_task, goal=[into, close])
    assert closed_later(drawer_task, into) is None and closed_later(closing, into) == joint
    monkeypatch.setattr(grasps, "openings", lambda *args: [out])
    usual = set(PickPlace.holds(drawer_task, into, data))
    assert set(PickPlace.holds(closing, into, data)) == usual and "left" in usual
    monkeypatch.setattr(mujoco.mjtJoint, "mjJNT_HINGE", model.jnt_type[joint])
    found = PickPlace.holds(closing, into, data)
    assert list(found) == ["inward", "inward flipped"]
    points = world_points(data, surface_points(model, drawer_task.objects[into.args[0]].geoms))
    for g in found.values():
        np.testing.assert_allclose(g.rotation[:, 2], -np.sqrt(0.5) * (out + UP), atol=1e-12)
        assert (points @ out < g.position @ out).mean() > 0.8 and abs(g.rotation[0, 0]) < 1e-9


def test_what_is_closed_is_opened_first_and_closed_last(drawer_task):
    model, data = drawer_task.model, mujoco.MjData(drawer_task.model)
    data.qpos[:] = drawer_task.init_states[0, 1 : 1 + model.nq]
    mujoco.mj_forward(model, data)
    top, into = drawer_task.sites["wooden_cabinet_1_top_region"], put_down(drawer_task, "contain", "wooden_cabinet_1_top_region")
    address = tuple(int(model.jnt_qposadr[j]) for j in top.joints)
    close = Predicate("close", (top.name,), "joint", qpos=address, sign=1.0, threshold=-0.005)
    assert [p.name for p in agenda(dataclasses.replace(drawer_task, goal=[close, into]), data)] == ["open", "in", "close"]
    data.qpos[address[0]] = model.jnt_range[top.joints[0]][0]
    mujoco.mj_forward(model, data)
    assert [p.name for p in agenda(dataclasses.replace(drawer_task, goal=[close, into]), data)] == ["in", "close"]
    assert agenda(drawer_task, data) == drawer_task.goal


def test_a_thing_at_the_top_of_its_flight_is_not_at_rest(drawer_task):
    env = make_env(drawer_task, 1, settle_steps=40)
    env.reset(options={"init_state": 0})
    data, bowl = env.data[0], drawer_task.objects["akita_black_bowl_1"]
    assert not unsettled(drawer_task, data)
    data.qpos[bowl.joint_qpos + 2] += 0.1
    mujoco.mj_fwdPosition(drawer_task.model, data)
    assert unsettled(drawer_task, data)


def test_joint_motion_is_the_derivative_of_the_pose(drawer_task):
    model, data = drawer_task.model, mujoco.MjData(drawer_task.model)
    data.qpos[:] = drawer_task.init_states[0, 1 : 1 + model.nq]
    for joint in (j for o in drawer_task.objects.values() for j in o.joints):
        mujoco.mj_kinematics(model, data)
        body = model.jnt_bodyid[joint]
        local = np.array([0.03, -0.02, 0.01])
        point = data.xpos[body] + data.xmat[body].reshape(3, 3) @ local
        motion = joint_motion(model, data, joint, point)
        data.qpos[model.jnt_qposadr[joint]] += 1e-6
        mujoco.mj_kinematics(model, data)
        moved = data.xpos[body] + data.xmat[body].reshape(3, 3) @ local
        np.testing.assert_allclose((moved - point) / 1e-6, motion, atol=1e-6)


def replay(task, episode) -> tuple[list[bool], np.ndarray]:
    """Success after each of an episode's actions, played from its first state, and the states that they lead to."""
    env = make_env(task, 1, autoreset_mode=AutoresetMode.DISABLED)
    env.set_state(episode.states[:1])
    flags, states = zip(*[(bool(env.step(action[None])[2][0]), env.get_state()[0]) for action in episode.actions], strict=True)
    env.close()
    return list(flags), np.array(states)


def test_demonstrations_succeed_replay_and_do_not_depend_on_the_batch(pulling):
    ticks = []
    episodes = collect(pulling, 2, seed=3, num_envs=2, replayable=True, progress=ticks.append)
    assert sum(ticks) == 2
    again = collect(pulling, 2, seed=3, num_envs=1, replayable=True, progress=False)
    for episode, other in zip(episodes, again, strict=True):
        assert episode.success and 20 < episode.length < 150
        assert episode.attrs["strategy"] == PULL.name and episode.attrs["strategy_index"] == 0
        assert set(episode.actions[:, 6]) == {-1.0, 1.0} and np.abs(episode.actions).max() <= 1.0
        np.testing.assert_array_equal(episode.actions, other.actions)
        np.testing.assert_array_equal(episode.states, other.states)
        flags, states = replay(pulling, episode)
        assert flags == [False] * (episode.length - 1) + [True]
        np.testing.assert_array_equal(states, [*episode.states[1:], episode.final_state])


def test_an_action_is_a_function_of_the_state(pulling):
    env = make_env(pulling, 1, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(options={"init_state": 0})
    one, two = (Demonstrator(pulling, PULL, 0.0) for _ in range(2))
    two.act(env.data[0])  # plans from the first state, like the other
    for k in range(12):
        action = one.act(env.data[0])
        if k == 11:  # the other one has not seen what came between
            np.testing.assert_array_equal(action, two.act(env.data[0]))
        env.step(action[None])


def test_a_stretched_arm_is_drawn_in_and_not_turned(pulling):
    data = mujoco.MjData(pulling.model)
    data.qpos[pulling.arm_qpos] = pulling.initial_joints
    mujoco.mj_kinematics(pulling.model, data)
    attempt, flow, twist = Demonstrator(pulling, PULL), np.array([0.1, 0.0, 0.02]), np.array([0.0, 0.5, 0.0])
    attempt.steps = [Step(pulling.goal[0], SimpleNamespace(far_out=True))]
    same = attempt._within_reach(flow, twist, data)
    assert same[0] is flow and same[1] is twist
    data.qpos[pulling.arm_qpos[1]], data.qpos[pulling.arm_qpos[3]] = 1.3, -0.1
    mujoco.mj_kinematics(pulling.model, data)
    drawn_in, turned = attempt._within_reach(flow, twist, data)
    attempt.steps[0].skill.far_out = False
    assert attempt._within_reach(flow, twist, data)[0] is flow
    attempt.steps, attempt.stage = attempt.steps * 2, 1  # where an earlier step has left the hand, if it still has to turn
    np.testing.assert_array_equal(attempt._within_reach(flow, twist, data)[0], drawn_in)
    assert attempt._within_reach(flow, 0.3 * twist, data)[0] is flow
    outward = data.xanchor[attempt._arm[5]] - data.xanchor[attempt._arm[1]]
    outward /= np.linalg.norm(outward)
    assert not turned.any() and flow @ outward > 0.05 and drawn_in @ outward == pytest.approx(-0.02)
    np.testing.assert_allclose(np.cross(drawn_in, outward), np.cross(flow, outward), atol=1e-12)  # sideways it is free


@pytest.mark.parametrize("speed", [0.0, 0.02])
def test_a_hand_that_turns_in_place_is_not_stuck(pulling, monkeypatch, speed):
    data, attempt = mujoco.MjData(pulling.model), Demonstrator(pulling, PULL, 0.0)
    data.qpos[pulling.arm_qpos] = pulling.initial_joints
    monkeypatch.setattr(attempt, "_command", lambda data, hand: (np.zeros(3), hand.rotation, CLOSE))
    for _ in range(30):
        data.qpos[pulling.arm_qpos[6]] += speed  # the last joint of the wrist (rad)
        mujoco.mj_kinematics(pulling.model, data)
        attempt.act(data)
    assert attempt.failed == (speed == 0.0)


def test_a_way_that_does_not_exist_fails_and_is_reported(pulling, monkeypatch):
    wrong = Strategy("wrong", {"contact": "the other side", "path": "near"})
    env = make_env(pulling, 1)
    env.reset(options={"init_state": 0})
    attempt = Demonstrator(pulling, wrong)
    attempt.act(env.data[0])
    assert attempt.failed
    monkeypatch.setitem(rehearsal._strategies, (pulling.id, pulling.assets), [wrong])
    with pytest.raises(UserError, match="'wrong' succeeded 0 times"):
        collect(pulling, 2, progress=False)


def test_collected_sets_are_kept_and_a_damaged_one_is_made_again(pulling, monkeypatch, tmp_path):
    monkeypatch.setenv("RL_DATA_ENGINE_CACHE", str(tmp_path))
    first = load_or_collect(pulling, 1, progress=False)
    monkeypatch.setattr(collection, "collect", lambda *a, **k: pytest.fail("not taken from the cache"))
    kept = load_or_collect(pulling, 1, progress=False)
    np.testing.assert_array_equal(kept[0].actions, first[0].actions)
    assert kept[0].attrs["strategy"] == PULL.name
    (file,) = (tmp_path / "demos").glob("*.hdf5")
    file.write_bytes(file.read_bytes()[:1000])
    monkeypatch.undo()
    monkeypatch.setenv("RL_DATA_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setitem(rehearsal._strategies, (pulling.id, pulling.assets), [PULL])
    np.testing.assert_array_equal(load_or_collect(pulling, 1, progress=False)[0].actions, first[0].actions)
    with h5py.File(file, "r+") as damaged:  # one of those that it holds
        damaged.copy("data/demo_0", "data/demo_1")
        damaged["data/demo_1/states"][2, 3] = np.nan
        damaged["data"].attrs["num_demos"] = 2
    assert len(read_episodes(file, pulling)) == 1
    file.rename(cache.cache_file(pulling, "episodes", "hdf5", 2, 0, 0.1))
    assert len(load_or_collect(pulling, 2, progress=False)) == 2


def test_what_is_kept_is_kept_for_this_code_alone(pulling, monkeypatch):
    """Any file of the demonstrator or the simulator may change what it does."""
    folder, before, original = Path(cache.__file__).parents[1], cache.cache_file(pulling, "episodes", "hdf5", 8), Path.read_bytes
    for changed in ("demos/articulate.py", "libero/step.py", "libero/env.py", "libero/goals.py", "libero/build.py"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path, c=changed: original(path) + b"#" * (path == folder / c))
            cache._source.cache_clear()
            assert cache.cache_file(pulling, "episodes", "hdf5", 8) != before
    cache._source.cache_clear()
    assert cache.cache_file(pulling, "episodes", "hdf5", 8) == before


@pytest.mark.parametrize("outcomes, passed", [("1111", True), ("110111", True), ("0111011", False), ("00", False), ("011111", True)])
def test_a_rehearsal_ends_as_soon_as_its_outcome_is_known(outcomes, passed):
    trials = {"way": Trials(PULL)}
    under_way = []
    for outcome in outcomes:
        while (attempt := next_trial(trials)) is not None:
            under_way.append(attempt)
        assert 1 <= len(under_way) <= 2 and not trials["way"].passed()
        assert [a.seed[0] for a in under_way] == list(range(len(trials["way"].outcomes), trials["way"].begun))
        trials[under_way.pop(0).key].outcomes.append(outcome == "1")
        if trials["way"].outcomes.count(False) > 1:
            break
    assert trials["way"].passed() == passed and trials["way"].missing() == 0
    assert next_trial(trials) is None


@pytest.mark.parametrize("outcomes, shorter", [("111100", True), ("0111110", True), ("110110", False), ("1100", False)])
def test_a_long_rehearsal_holds_a_short_one(outcomes, shorter):
    trials = Trials(PULL, (8, 12), outcomes=[outcome == "1" for outcome in outcomes])
    assert not trials.passed() and trials.missing() == 0 and trials.passed((4, 6)) == shorter


@pytest.mark.parametrize("needed", [150, 300, 301])
def test_what_takes_long_counts_where_nothing_else_works(drawer_task, monkeypatch, needed):
    """Episodes are made up: one contact works, and takes `needed` of the task's 300 steps."""
    contacts = set()

    def perform(task, next_attempt, noise, num_envs, max_steps, physics):
        while (attempt := next_attempt()) is not None:
            contacts.add(attempt.strategy.factors["contact"])
            yield attempt, SimpleNamespace(success=attempt.strategy.factors["contact"] == "middle" and needed <= max_steps)

    monkeypatch.setattr(rehearsal, "perform", perform)
    assert drawer_task.max_steps == 300
    if needed > 300:
        with pytest.raises(UserError, match="finds no way that works"):
            rehearsal.rehearse(drawer_task)
    else:
        assert {f["contact"] for f in rehearsal.rehearse(drawer_task)} == {"middle"}
    assert len(contacts) > 1


def test_a_drawer_is_dragged_where_the_hand_does_not_fit_around_its_handle(drawer_task, monkeypatch):
    """It works on any drawer, with closed fingers on the handle; where it can be taken, that is what is done."""
    strategies = [Strategy("", {"contact": f"drag {end}", "path": "direct"}) for end in ("left end", "middle")]
    queue = [Attempt(k, strategy, [k], None) for strategy in strategies for k in range(2)]
    done = list(perform(drawer_task, lambda: queue.pop() if queue else None, 0.1, 4))
    assert [episode.success for _, episode in done] == [True] * 4
    assert all((episode.actions[-10:, 6] == 1.0).all() for _, episode in done)

    (goal,), env = drawer_task.goal, make_env(drawer_task)
    env.reset(seed=0)
    found = Articulate.holds(drawer_task, goal, env.data[0])
    usual = Articulate.order(found)
    assert usual and set(found) - set(usual) == {"drag left end", "drag middle", "drag right end"}
    monkeypatch.setattr(articulate, "drawer_grasps", lambda *_: {})
    found = Articulate.holds(drawer_task, goal, env.data[0])
    assert Articulate.order(found) == list(found) and len(found) == 3


@pytest.mark.parametrize("hard, works", [({3, 5}, True), ({1, 3}, False)])
def test_what_works_mostly_counts_where_nothing_passes(drawer_task, monkeypatch, hard, works):
    """Episodes are made up: of the training states that all ways begin in, two are too hard for any of them."""

    def perform(task, next_attempt, noise, num_envs, max_steps, physics):
        while (attempt := next_attempt()) is not None:
            yield attempt, SimpleNamespace(success=attempt.seed[0] not in hard)

    monkeypatch.setattr(rehearsal, "perform", perform)
    if works:  # four of six
        assert len(rehearsal.rehearse(drawer_task)) == MAX_STRATEGIES
    else:  # two of four
        with pytest.raises(UserError, match="finds no way that works"):
            rehearsal.rehearse(drawer_task)


def test_rehearsal_of_several_steps_finds_the_choice_that_is_to_blame(drawer_task, monkeypatch):
    """Episodes are made up: they fail at the first step with one contact, and at the second with two of the grasps."""
    task = dataclasses.replace(drawer_task, goal=[put_down(drawer_task, "contain", "wooden_cabinet_1_top_region")])
    model, data = task.model, mujoco.MjData(task.model)
    data.qpos[:] = task.init_states[0, 1 : 1 + model.nq]
    mujoco.mj_forward(model, data)
    steps = agenda(task, data)
    holds = [SKILLS[p.name].holds(task, p, data) for p in steps]
    bad = [Articulate.order(holds[0])[:1], PickPlace.order(holds[1])[:2]]
    made = []

    def perform(task, next_attempt, *args, **how):
        while (attempt := next_attempt()) is not None:
            factors = attempt.strategy.factors
            made.append(factors)
            wrong = [factors["step 1 contact"] in bad[0], factors["step 2 grasp"] in bad[1]]
            attempt.stage = wrong.index(True) if any(wrong) else 1
            yield attempt, SimpleNamespace(success=not any(wrong))

    monkeypatch.setattr(rehearsal, "perform", perform)
    found = rehearsal._rehearse_steps(task, steps, data)
    assert len(found) == MAX_STRATEGIES == len({tuple(f.items()) for f in found})
    assert not any(f["step 1 contact"] in bad[0] or f["step 2 grasp"] in bad[1] for f in found)
    assert {f["step 2 grasp"] for f in found} == set(PickPlace.order(holds[1])) - set(bad[1])
    assert len(made) < 160

    def drag(task, next_attempt, *args, **how):
        for attempt in iter(next_attempt, None):
            attempt.stage = 0
            yield attempt, SimpleNamespace(success=attempt.strategy.factors["step 1 contact"].startswith("drag"))

    monkeypatch.setattr(rehearsal, "perform", drag)
    assert {f["step 1 contact"] for f in rehearsal.rehearse(task)} == {"drag left end", "drag right end", "drag middle"}

    def fail(task, next_attempt, *args, **how):
        return ((attempt, SimpleNamespace(success=False)) for attempt in iter(next_attempt, None))

    monkeypatch.setattr(rehearsal, "perform", fail)
    with pytest.raises(UserError, match="most attempts end at open"):
        rehearsal._rehearse_steps(task, steps, data)


def test_a_data_set_goes_on_where_it_was(pulling, assets, monkeypatch, tmp_path):
    path, how = tmp_path / "drawer_demo.hdf5", {"num_envs": 2, "assets": assets, "progress": False}
    lines = make_file(path, "libero_goal/0", 2, 0, 0.05, **how)
    assert len(lines) == 1 and lines[0].startswith(f"{PULL.name}: 2 episodes of ")
    monkeypatch.setattr(collection, "collect", lambda *a, **k: pytest.fail("made again"))
    assert make_file(path, "libero_goal/0", 2, 0, 0.05, **how) == lines
    calls = []
    monkeypatch.setattr(collection, "collect", lambda *a, **k: calls.append(a) or read_episodes(path, pulling))
    make_file(path, "libero_goal/0", 2, 1, 0.05, **how)  # made in another way
    assert len(calls) == 1


def test_tasks_of_a_suite_are_worked_on_in_processes(tmp_path):
    """Each says what keeps it from its work: here, that there are no assets."""
    flags = ["--suite", "libero_goal", "--out", str(tmp_path), "--assets", str(tmp_path), "--workers", "1"]
    result = subprocess.run([sys.executable, "-m", "common.demos", *flags], capture_output=True, text=True)
    assert result.returncode == 2 and "error: 10 of 10 tasks have no demonstrations" in result.stderr
    assert result.stderr.count("is not a whole LIBERO asset tree") == 20 and "Traceback" not in result.stderr
    result = subprocess.run([sys.executable, "-m", "common.demos", *flags, "--episodes", "0"], capture_output=True, text=True)
    assert result.stderr == "error: --episodes must be at least 1, not 0\n"
