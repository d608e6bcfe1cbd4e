"""Anyone's policy: what it is shown, what its answer means, its server, and what may be wrong with it."""

from __future__ import annotations

import contextlib
import json
import threading

import numpy as np
import pytest

import vla_finetune
from common import policies
from common.cli import UserError
from common.data.vla import CAMERAS
from common.libero.renderers import make_renderer
from common.policies import TURNS, Policy, check_conventions, find_policy, instruction_of
from common.suites import task_names
from tests.test_vla_finetune import official, short  # noqa: F401  (fixtures)
from tests.test_vla_pretrain import run_main

OPEN, SHUT = [0, 0, 0, 0, 0, 0, -1.0], [0, 0, 0, 0, 0, 0, 1.0]


def still(observations):
    return np.tile(OPEN, (len(observations["prompt"]), 5, 1))


def asked(count: int = 2, size: int = 8):
    images = np.random.default_rng(0).integers(0, 255, (count, 2, size, size, 3), np.uint8)
    return images, np.arange(8.0 * count).reshape(count, 8), np.arange(count), np.full(count, 5)


def test_what_a_policy_is_shown():
    """openpi's example: LIBERO's pictures (bottom row first, ours are upright) rotated by 180 degrees; state; the sentence."""
    seen = {}
    policy = Policy(lambda observations: seen.update(observations) or still(observations), "it", "do it", 5, size=8)
    images, proprio, episodes, steps = asked()
    actions = policy(images, proprio, episodes, steps)
    libero = images[:, :, ::-1]
    np.testing.assert_array_equal(seen["observation/image"], libero[:, 0, ::-1, ::-1])
    np.testing.assert_array_equal(seen["observation/wrist_image"], libero[:, 1, ::-1, ::-1])
    np.testing.assert_array_equal(seen["observation/state"], proprio)
    assert seen["prompt"] == ["do it"] * 2 and list(seen["episode"]) == [0, 1] and list(seen["step"]) == [5, 5]
    assert actions.shape == (2, 5, 7)


def test_pictures_are_made_smaller_with_antialiasing():
    """A chequerboard of single pixels becomes grey; without antialiasing it would stay black and white."""
    board = np.zeros((1, 2, 256, 256, 3), np.uint8)
    board[..., ::2, ::2, :] = board[..., 1::2, 1::2, :] = 255
    small = policies.resize(board, 64)
    assert small.shape == (1, 2, 64, 64, 3) and np.abs(small.astype(int) - 127).max() <= 4


def test_actions_are_clipped_as_libero_does():
    policy = Policy(lambda observations: 3.0 * np.ones((2, 5, 7)), "it", "do it", 5, size=8)
    assert policy(*asked()).max() == 1 and policy.beyond == 3


@pytest.mark.parametrize(
    "answer, message",
    [
        (np.zeros((2, 7)), r"returned actions of shape \(2, 7\), not \(2, chunk, 7\)"),
        (np.zeros((3, 5, 7)), r"returned actions of shape \(3, 5, 7\), not \(2, chunk, 7\)"),
        (np.zeros((2, 5, 8)), r"returned actions of shape \(2, 5, 8\), not 7 numbers an action"),
        (np.zeros((2, 4, 7)), "returned chunks of 4 actions; pass --replan 4 or less"),
        (np.full((2, 5, 7), np.nan), "returned actions that are not finite"),
        ([np.zeros((5, 7)), np.zeros((6, 7))], "no array of actions of one shape"),
        (None, "returned actions of shape"),
    ],
)
def test_answers_that_are_no_actions(answer, message):
    with pytest.raises(UserError, match=message) as error:
        Policy(lambda observations: answer, "--policy it", "do it", 5, size=8)(*asked())
    assert "\n" not in str(error.value)


def test_instructions_are_those_of_published_evaluations():
    """LIBERO's `Task.language`, which openpi and OpenVLA send: the sentence in the name, without the scene."""
    from common.libero.original import import_libero

    import_libero(None)
    from libero.libero.benchmark import grab_language_from_filename

    class Named:
        index = 0

    for names in task_names().values():
        for Named.name in names:
            assert instruction_of(Named) == grab_language_from_filename(f"{Named.name}.bddl")


# ---------------------------------------------------------------------------------------------- a callable


def test_functions_and_classes_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_policy.py").write_text(
        "import numpy as np\nasked = []\n"
        "def act(observations):\n    asked.append(observations)\n    return np.zeros((1, 5, 7))\n"
        "class Loaded:\n    def __init__(self):\n        self.weights = 2\n"
        "    def __call__(self, observations):\n        return self.weights\n"
        "def fails(observations):\n    raise KeyError('camera')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert find_policy("my_policy:act", 1)({}).shape == (1, 5, 7)
    assert find_policy(str(tmp_path / "my_policy.py") + ":Loaded", 1)({}) == 2
    with pytest.raises(UserError, match=r"--policy my_policy:fails failed: KeyError: 'camera' \(.*my_policy.py:12\)"):
        find_policy("my_policy:fails", 1)({})
    for spec, message in {
        "my_policy": "is neither module:function, file.py:function nor ws://host:port",
        "my_policy:nothing": "does not load: AttributeError",
        "my_policy:asked": "is a list, not a function",
        "my_policee:act": "does not load: ModuleNotFoundError",
        "nowhere/my_policy.py:act": "there is no file nowhere/my_policy.py",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            find_policy(spec, 1)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------- a server


@contextlib.contextmanager
def serve(act):
    """A server as openpi's: it says what it is, and answers each request, a dict of arrays, with actions."""
    msgpack = pytest.importorskip("msgpack", reason=f"a policy server needs: {policies.OPTIONAL}")
    server_module = pytest.importorskip("websockets.sync.server", reason=f"a policy server needs: {policies.OPTIONAL}")

    def array(value):
        is_array = b"__ndarray__" in value
        return np.ndarray(value[b"shape"], np.dtype(value[b"dtype"]), value[b"data"]) if is_array else value

    def message(value):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}

    def handle(connection):
        connection.send(msgpack.packb({"model": "a small one"}))
        for request in connection:
            answer = act(msgpack.unpackb(request, object_hook=array))
            connection.send(answer if isinstance(answer, str) else msgpack.packb(answer, default=message))

    with server_module.serve(handle, "127.0.0.1", 0, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()


def test_a_server_is_asked_for_all_environments_at_once():
    """Each request is one environment's, and none waits for another's answer."""
    together = threading.Barrier(3, timeout=30)

    def act(observation):
        together.wait()
        assert set(observation) == {"observation/image", "observation/wrist_image", "observation/state", "prompt"}
        assert observation["observation/image"].shape == (8, 8, 3) and observation["observation/image"].dtype == np.uint8
        return {"actions": np.full((10, 7), observation["observation/state"][0] / 100), "timing": {"ms": 1.0}}

    with serve(act) as address:
        answer = find_policy(address, 3)
        actions = Policy(answer, "it", "do it", 5, size=8)(*asked(3))
        assert answer.metadata == {"model": "a small one"} and actions.shape == (3, 10, 7)
        np.testing.assert_allclose(actions[:, 0, 0], [0, 0.08, 0.16])
        answer.close()


def test_servers_that_fail():
    answers = iter([{"no": 1}, "Traceback ...\nValueError: no such camera\n"])
    with serve(lambda observation: next(answers)) as address:
        answer = find_policy(address, 1)
        policy = Policy(answer, "it", "do it", 5, size=8)
        with pytest.raises(UserError, match="sent an answer without 'actions'"):
            policy(*asked(1))
        with pytest.raises(UserError, match="the policy server at .* failed: ValueError: no such camera"):
            policy(*asked(1))
        answer.close()
    with pytest.raises(UserError, match="no policy server answers at ws://127.0.0.1.*start it, or name another") as error:
        find_policy(address, 1)
    assert "\n" not in str(error.value)


def test_without_the_optional_packages(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "msgpack", None)
    with pytest.raises(UserError, match="needs msgpack, which is not installed; run: pip install -r requirements-policies.txt"):
        find_policy("ws://127.0.0.1:1", 1)


# ---------------------------------------------------------------------------------------------- conventions


@pytest.fixture(scope="module")
def watched(drawer_task, official):  # noqa: F811
    """A demonstration, a camera, and a function that asks about an altered copy of its actions."""
    index, episode = next(iter(official.items()))
    camera = make_renderer(drawer_task.model, tuple(CAMERAS.values()), 32, 32)

    def check(alter):
        def answer(observations):
            plans = np.stack([np.resize(episode.actions[t : t + 5], (5, 7)) for t in observations["step"]])
            return alter(plans, observations)

        policy = Policy(answer, "it", "do it", 5, size=32)
        return check_conventions(drawer_task, policy, camera, episode)

    return episode, check


def test_a_policy_that_knows_the_demonstration_agrees(watched):
    episode, check = watched
    found, remarks = check(lambda plans, observations: plans)
    assert found["replayed"] and found["steps"] == episode.length and remarks == []
    assert found["translation"] == pytest.approx(1) and found["gripper"] == 1
    assert found["largest"] == pytest.approx(np.abs(episode.actions[:, :3]).max(), abs=0.3)


@pytest.mark.parametrize(
    "factor, shift, remark",
    [
        ([1, 1, 1, 1, 1, 1, -1], 0, "its gripper has the other sign"),
        ([1, 1, 1, 1, 1, 1, 0.5], 0.5, "its gripper never opens"),
        ([0.05] * 3 + [0.5] * 3 + [1], 0, "are they metres"),
        ([9, 9, 9, 9, 9, 9, 1], 0, "are they normalised otherwise"),
        ([-1, -1, -1, 1, 1, 1, 1], 0, "its translation goes against the demonstration's"),
    ],
)
def test_other_conventions_are_recognised(watched, factor, shift, remark):
    def alter(plans, observations):
        plans = plans * factor
        plans[..., 6] += shift
        return plans

    _, remarks = watched[1](alter)
    assert len(remarks) == 1 and remark in remarks[0]


def test_pictures_turned_otherwise_are_recognised(watched):
    """A policy that knows its way only where the top of the picture is what it was in training."""
    upright = []

    def alter(plans, observations):
        upright.append(observations["observation/image"].astype(int))
        expected = upright[0][:, ::-1, ::-1]  # what is shown first is upright and mirrored; LIBERO's is upside down
        return plans if np.array_equal(upright[-1], expected) else -plans

    found, remarks = watched[1](alter)
    way = "as LIBERO returns them"
    assert found["turned"][way] == pytest.approx(1) and set(found["turned"]) == set(TURNS)
    assert any(f"agrees better when pictures are {way}" in line for line in remarks)


# ---------------------------------------------------------------------------------------------- the whole job


def test_from_a_function_to_results(tmp_path, monkeypatch, drawer_task, official, short, assets):  # noqa: F811
    """A policy that knows two demonstrations by heart succeeds where they began, at their last step, in the usual files."""
    arrays = {str(i): e.actions for i, e in official.items()}
    np.savez(tmp_path / "known.npz", **arrays)
    (tmp_path / "by_heart.py").write_text(
        f"import numpy as np\nknown = dict(np.load({str(tmp_path / 'known.npz')!r}))\n"
        "def act(observations):\n"
        "    plans = np.tile([0, 0, 0, 0, 0, 0, -1.0], (len(observations['prompt']), 5, 1))\n"
        "    for plan, i, t in zip(plans, observations['episode'], observations['step']):\n"
        "        actions = known.get(str(i), plan[:0])[t : t + 5]\n"
        "        plan[: len(actions)] = actions\n"
        "    return plans\n"
    )
    monkeypatch.setattr(policies, "DRAWN", 32)
    monkeypatch.setattr(policies, "collect", lambda *args, **kwargs: [next(iter(official.values()))])
    flags = ["--eval-only", "--policy", f"{tmp_path}/by_heart.py:act", "--tasks", drawer_task.id, "--trials", "3", "--num-envs", "2"]
    flags += ["--videos", "0", "--policy-size", "32", "--renderer", "warp", "--assets", assets, "--run-folder", str(tmp_path / "runs")]
    run_main(monkeypatch, vla_finetune, *flags)
    (run,) = (tmp_path / "runs").iterdir()
    results = json.loads((run / "results.json").read_text())
    (row,) = results["tasks"]
    assert row["outcomes"] == [i in official for i in range(3)] and row["mean_length"] == np.mean([e.length for e in official.values()])
    assert row["prompt"] == "open the middle drawer of the cabinet" and results["protocol"]["replan"] == 5
    assert results["conventions"]["replayed"] and results["conventions"]["demonstration"] == "scripted"
    assert json.loads((run / "summary.json").read_text())["success_rate"] == len(official) / 3


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--policy", "a:b"], "--policy is only evaluated: pass --eval-only, too"),
        (["--policy", "a:b", "--eval-only", "--checkpoint", "c"], "name one of them"),
        (["--policy", "a:b", "--eval-only"], "--policy needs the --tasks"),
    ],
)
def test_flags_that_cannot_work(flags, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        run_main(monkeypatch, vla_finetune, *flags)


def test_what_the_benchmark_reports():
    """Episodes an hour by hand; and its policy, which a callable and a server are asked alike."""
    from benchmarks.policies import act, table

    rows = {"callable": {"episodes": 200, "seconds": 360.0}, "usual loop": {"episodes": 2, "seconds": 72.0}}
    lines = table(rows).splitlines()
    assert lines[2] == "| callable | 200 | 360 | 2000 | 20.0 x |" and lines[3] == "| usual loop | 2 | 72 | 100 | 1.0 x |"
    images, proprio, episodes, steps = asked(3)
    together = Policy(act, "it", "do it", 5, size=8)(images, proprio, episodes, steps)
    each = [Policy(act, "it", "do it", 5, size=8)(images[i : i + 1], proprio[i : i + 1], episodes[:1], steps[:1])[0] for i in range(3)]
    np.testing.assert_array_equal(together, each)
