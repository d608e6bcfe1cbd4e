"""benchmarks/renderers.py: its measures by hand, textures halved as OpenGL halves them; with a GL library, LIBERO's own pictures."""

import os
import subprocess
import sys

import mujoco
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks import renderers as benchmark
from common.cli import UserError


def test_measures():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 200, (40, 50, 3)).astype(np.uint8)
    b = a.copy()
    b[:4, :5, 1] += 9  # 20 of 2,000 pixels, in one channel of three
    b[4:8, :5] += 2
    found = benchmark.measure(b, a)
    assert found["mean"] == pytest.approx((20 * 9 + 20 * 6) / 6000) and found["mse"] == pytest.approx((20 * 81 + 20 * 12) / 6000)
    assert (found["largest"], found["over_8"], found["over_1"]) == (9, pytest.approx(0.01), pytest.approx(0.02))
    assert benchmark.ssim(a, a) == pytest.approx(1.0) and 0.9 < found["ssim"] < 1
    flat = [np.full((20, 20, 3), value, np.uint8) for value in (100, 120)]
    c1 = (0.01 * 255) ** 2  # of flat pictures, only the luminance term is left
    assert benchmark.ssim(*flat) == pytest.approx((2 * 100 * 120 + c1) / (100**2 + 120**2 + c1))
    pair = benchmark.pooled([found, benchmark.measure(a, a)])
    assert pair["mean"] == found["mean"] / 2 and pair["largest"] == 9 and pair["over_8"] == pytest.approx(0.005)
    assert pair["psnr"] == pytest.approx(10 * np.log10(255**2 / (found["mse"] / 2)))
    assert benchmark.pooled([benchmark.measure(a, a)])["psnr"] is None


def test_textures_are_halved_as_mipmaps():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 32, 3)).astype(np.uint8)
    half = np.asarray(benchmark.halved(Image.fromarray(image), 16, False)).astype(float)
    np.testing.assert_allclose(half, image.reshape(32, 2, 16, 2, 3).mean((1, 3)), atol=0.51)
    sides = {(1270, 1270): (317, 317), (4096, 4096): (256, 256), (800, 1024): (400, 512), (511, 511): (511, 511)}
    for size, expected in sides.items():
        assert benchmark.halved(Image.new("RGB", size), 256, False).size == expected
    ramp = np.broadcast_to(40.0 * np.arange(5)[None, :, None], (5, 5, 3)).astype(np.uint8)  # two centres between five: 0.75 and 3.25
    assert np.abs(np.asarray(benchmark.halved(Image.fromarray(ramp), 2, False))[0, :, 0].astype(int) - [30, 130]).max() <= 1
    board = np.repeat(np.indices((8, 8)).sum(0)[..., None] % 2 * 255, 3, -1).astype(np.uint8)
    for srgb, grey in ((False, 128), (True, 188)):  # half of the light is 188 in sRGB
        assert np.unique(benchmark.halved(Image.fromarray(board), 4, srgb)).tolist() == [grey]


def test_a_model_with_halved_textures(tmp_path):
    marked = PngInfo()
    marked.add(b"sRGB", b"\0")
    Image.new("RGB", (64, 64), (200, 100, 50)).save(tmp_path / "plain.png")
    Image.new("RGB", (64, 64), (200, 100, 50)).save(tmp_path / "marked.png", pnginfo=marked)
    files = "".join(f'<texture name="{name}" type="2d" file="{tmp_path}/{name}.png"/>' for name in ("plain", "marked"))
    xml = f"""<mujoco><asset>{files}<texture name="c" type="2d" builtin="flat" width="64" height="64"/></asset>
        <worldbody><body name="x"><geom size="1"/></body></worldbody></mujoco>"""
    model = mujoco.MjModel.from_xml_string(xml)
    model.body("x").pos[:] = 1, 2, 3
    smaller = benchmark.with_halved_textures(xml, model, 16, tmp_path)
    assert smaller.tex_width.tolist() == [16, 16, 64] and (smaller.tex_colorspace == model.tex_colorspace).all()
    np.testing.assert_array_equal(smaller.body("x").pos, [1, 2, 3])
    np.testing.assert_allclose(smaller.tex_data[: 16 * 16 * 3].reshape(-1, 3), [[200, 100, 50]] * 256, atol=1)


def test_gl_pictures_are_liberos_own(gl):
    """Pixel for pixel, where LIBERO's environment and our task have the same textures: those of the stand-ins are small."""
    code = """if True:
        from benchmarks.renderers import Args, compare_in_a_process, table
        args = Args(sizes=(32, 48), textures=(), assets="standin")
        results, shown = compare_in_a_process("libero_goal/7", args)
        print(table(results, args.sizes, args.textures))
        assert shown["agentview"][0][0].shape == (48, 48, 3) and shown["agentview"][0][0].std() > 10
    """
    result = subprocess.run([sys.executable, "-c", code], env=os.environ | {"MUJOCO_GL": gl}, capture_output=True, text=True)
    rows = [line.strip("|").split("|") for line in result.stdout.splitlines()[2:]]
    assert len(rows) == 4 * 4, result.stderr
    for row in rows[:8]:  # MuJoCo's renderer on LIBERO's model, and on the compiled task
        assert row[3:7] == [" 0 ", " 0.00% ", " 0.00% ", " equal "]
    assert all(float(row[7]) > 0.6 for row in rows[8:])  # the ray tracer: other edges, the same picture


def test_refused(monkeypatch, capsys):
    for flags, message in ((["--sizes", "0"], "must be at least 1"), (["--tasks"], "at least one task")):
        monkeypatch.setattr(sys, "argv", ["renderers.py", *flags])
        with pytest.raises(UserError, match=message):
            benchmark.main()
    monkeypatch.setattr(sys, "argv", ["renderers.py"])
    monkeypatch.setattr(benchmark, "find_gl", lambda: (None, "no library"))
    with pytest.raises(UserError, match="need a GL library: no library"):
        benchmark.main()
