#!/usr/bin/env bash
# The other releases of MuJoCo that are supported (docs/versions.md). Under each: does everything import, does a task compile, does it step
# as LIBERO's own environment does, are pictures drawn as they should be? To be run in an environment with all requirements; the others
# borrow its packages and have only MuJoCo, and what goes with it, of their own. A minute or two.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
packages() { "$1" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])"; }

under() {
  python -m venv --without-pip "$folder/$1"
  local other="$folder/$1/bin/python"
  packages python > "$(packages "$other")/zz-borrowed.pth"
  python -m pip --python "$other" install -q --no-deps --ignore-installed "${@:2}"
  [ "$("$other" -c "import mujoco; print(mujoco.__version__)")" = "$1" ]
  "$other" -m benchmarks.versions --check libero_goal/0 --assets standin
  "$other" -m pytest -q tests/test_render.py -k "lighting or states_move"
}

under 3.3.7 mujoco==3.3.7
under 4.0.0 mujoco==4.0.0 mujoco-core==4.0.0 mujoco-studio==4.0.0 mujoco-warp==4.0.0 warp-lang==1.19.0
