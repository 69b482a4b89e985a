# Sourced by the other scripts: makes .venv at the root of the tree and installs the project with the extras given.
# Nothing is installed twice: a stamp remembers what the environment was made from.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "error: $*" >&2; exit 1; }

# environment EXTRA,EXTRA...   (may be empty)
environment() {
    local extras=$1 python=${PYTHON:-python3}
    command -v "$python" >/dev/null || fail "Python 3.11 or newer is needed; install it, or set PYTHON"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or newer is needed, $("$python" --version) was found; set PYTHON to a newer one"
    if [ ! -x .venv/bin/python ]; then
        rm -rf .venv
        "$python" -m venv .venv || { rm -rf .venv; fail "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv"; }
    fi
    # The host device compiles the kernels; pip brings a compiler where the machine has none.
    local compiler
    for compiler in ${CXX:-} c++ g++ clang++; do command -v "$compiler" >/dev/null && break; compiler=; done
    [ -n "$compiler" ] || extras="${extras:+$extras,}compiler"
    # CuPy where there is a driver, for the newest CUDA that it knows.
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1 && ! .venv/bin/python -c 'import cupy' 2>/dev/null; then
        local cuda
        cuda=$(nvidia-smi | sed -n 's/.*CUDA Version: \([0-9]*\).*/\1/p')
        [ "${cuda:-0}" -ge 13 ] && extras="${extras:+$extras,}cuda13"
        [ "${cuda:-0}" -eq 12 ] && extras="${extras:+$extras,}cuda12"
    fi
    local stamp
    stamp="$(cksum < pyproject.toml) [$extras]"
    if ! grep -qxF "$stamp" .venv/installed 2>/dev/null; then
        echo "installing into .venv ..."
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}" ||
            fail "pip could not install the project; see above"
        echo "$stamp" >> .venv/installed
    fi
}
