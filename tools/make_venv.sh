#!/usr/bin/env bash
# Build .venv with the versions of constraints.txt on a Python >= 3.12, wherever one can be found.
# Run: tools/make_venv.sh (`make setup` does, once). Writes only .venv and .venv-bootstrap; never removes a .venv that works.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A name on PATH proves nothing (pyenv's shims exist for versions that are not switched on), so each candidate is run.
is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    local candidate
    # 3.12 first: the compiled wheels of constraints.txt were resolved for it.
    for candidate in python3.12 python3.13 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3.{12,13} /opt/*/bin/python3.{12,13} /usr/local/bin/python3.{12,13}; do
        if is_new_enough "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    if [ -n "${uv:-}" ]; then
        "$uv" python find '>=3.12' 2>/dev/null || "$uv" python install 3.12 >&2 && "$uv" python find 3.12
    fi
}

# uv installs in a tenth of pip's time. It goes into a venv of its own, made with whatever Python is there.
find_uv() {
    if [ -x .venv-bootstrap/bin/uv ]; then
        echo "$PWD/.venv-bootstrap/bin/uv"
        return
    fi
    local pin candidate
    pin=$(grep -oE '^uv==[0-9.]+' constraints.txt)
    for candidate in python3 python3.12 python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3 /usr/bin/python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 8))' >/dev/null 2>&1 &&
            "$candidate" -m venv --clear .venv-bootstrap >/dev/null 2>&1 &&
            .venv-bootstrap/bin/python -m pip install --quiet "$pin" >&2; then
            echo "$PWD/.venv-bootstrap/bin/uv"
            return
        fi
    done
    rm -rf .venv-bootstrap
    command -v uv || true
}

uv=$(find_uv)
if ! is_new_enough .venv/bin/python; then
    python=$(find_python || true)
    if [ -z "$python" ]; then
        echo "Shardwright needs Python 3.12 or newer and found none: install one (for example 'apt install python3.12" \
            "python3.12-venv', 'pyenv install 3.12' or 'conda create -n py312 python=3.12') and run 'make setup' again." >&2
        exit 2
    fi
    echo "setup: building .venv with $python"
    rm -rf .venv
    if [ -n "$uv" ]; then "$uv" venv --quiet --python "$python" .venv; else "$python" -m venv .venv; fi
fi

echo "setup: installing the versions of constraints.txt"
if [ -n "$uv" ]; then
    "$uv" pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable '.[dev]'
else
    .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
fi
echo "setup: ready, $(.venv/bin/python --version)"
