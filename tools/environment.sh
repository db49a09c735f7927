#!/usr/bin/env bash
# Makes the Python environment that the Makefile uses.
#
#   tools/environment.sh make VENV   make VENV, unless it is there and fits setup.py
#   tools/environment.sh key         print what a shared environment's name must contain
#
# PYTHON=/path/to/python chooses the interpreter. An environment whose install was interrupted, or
# whose setup.py or constraints have changed, is made anew. Everything pip says is kept in
# VENV/install.log.
set -euo pipefail
cd "$(dirname "$0")/.."

FITS='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))'
VERSION='import sys; print("{}.{}.{}".format(*sys.version_info[:3]))'
CONSTRAINTS=docker/constraints.txt

# What an environment was made from, in a few digits.
inputs() {
    cat setup.py "$CONSTRAINTS" | cksum
}

# Transformer Engine's Python (12 MB), which tests/gpu_on_cpu runs: in a folder that is in no path,
# as the engine would stumble over what is compiled and missing.
install_packages() {
    "$1/bin/python" -m pip install --editable '.[dev]' &&
        "$1/bin/python" -m pip install --no-deps --constraint "$CONSTRAINTS" \
            --target "$1/share/transformer-engine" transformer-engine
}

candidates() {
    printf '%s\n' python3.12 python3.13 python3.14 python3 python
    # pyenv's python3.12 refuses to run where another version is selected; the real one does not.
    local root="${PYENV_ROOT:-$HOME/.pyenv}"
    [ ! -d "$root/versions" ] || find "$root/versions" -maxdepth 3 -path '*/bin/python3.1[2-9]' | sort
}

# Print the first interpreter that works, or say what was looked for and end.
find_python() {
    local candidate looked="" list
    list=${PYTHON:-$(candidates)}
    while IFS= read -r candidate; do
        if "$candidate" -c "$FITS" >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
        looked+="  $candidate: $(why_not "$candidate")"$'\n'
    done <<<"$list"
    cat >&2 <<MESSAGE
No usable Python 3.12 or newer was found. Looked for:
$looked
Get one with, for example, one of
  uv python install 3.12
  pyenv install 3.12
  apt-get install python3.12 python3.12-venv
  brew install python@3.12
or name one that is elsewhere: make PYTHON=/path/to/python3.12 ...
MESSAGE
    exit 1
}

why_not() {
    local version
    if ! command -v "$1" >/dev/null; then
        echo "not found"
    elif ! version=$("$1" -c "$VERSION" 2>/dev/null); then
        echo "found, but it does not run here"
    elif "$1" -c 'import venv, ensurepip' >/dev/null 2>&1; then
        echo "version $version is too old"
    else
        echo "version $version, but without venv and ensurepip (Debian: package python3-venv)"
    fi
}

# Keep pip's lines in a file; show a moving line on a terminal, else what takes long.
show_progress() {
    local line file version count=0
    while IFS= read -r line; do
        echo "$line" >>"$1"
        case $line in
            Collecting*) count=$((count + 1)) ;;
            *Downloading*\([0-9][0-9][0-9]*\ MB\))
                file=${line#*Downloading }
                file=${file##*/}
                version=${file#*-}
                line="Downloading ${file%%-*} ${version%%-*} (${file##*(}"
                ;;
            "Installing collected packages"*) line="Unpacking $count packages" ;;
            *) continue ;;
        esac
        if [ -t 1 ]; then
            printf '\r\033[K  %.76s' "$line"
        elif [ "${line#Collecting}" = "$line" ]; then
            echo "  $line"
        fi
    done
    [ ! -t 1 ] || printf '\r\033[K'
}

make_environment() {
    local venv=$1 stamp wanted python
    stamp=$venv/.complete
    # An environment holds its own path, so one that was moved does not count as complete.
    wanted="$(inputs) $venv"
    mkdir -p "$(dirname "$venv")"
    exec 9>"$venv.lock"
    ! command -v flock >/dev/null || flock 9
    [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || return 0

    # Only what this script made is ever removed.
    if [ -e "$venv" ] && [ ! -e "$venv/install.log" ]; then
        echo "$venv exists and was not made by make: remove it or choose another VENV" >&2
        exit 1
    fi
    python=$(find_python)
    echo "Making the Python environment $venv with $python (once: some minutes, 6 GB)"
    rm -rf "$venv"
    mkdir "$venv"
    : >"$venv/install.log"
    "$python" -m venv "$venv"
    if ! install_packages "$venv" 2>&1 9>&- |
        show_progress "$venv/install.log"; then
        echo "pip could not install what setup.py asks for; the end of $venv/install.log:" >&2
        tail -n 20 "$venv/install.log" >&2
        exit 1
    fi
    echo "$wanted" >"$stamp"
    echo "The environment is complete."
}

case "${1-} ${2-}" in
    "key ")
        python=$(find_python)
        echo "$("$python" -c "$VERSION")-$(inputs | tr ' ' '-')"
        ;;
    "make "?*)
        case $2 in /*) make_environment "$2" ;; *) make_environment "$PWD/$2" ;; esac
        ;;
    *)
        sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
