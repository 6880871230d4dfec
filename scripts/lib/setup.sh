# Sourced by scripts/test, scripts/demo and scripts/bench: everything between a bare Debian 12 and a working .venv.
# Needs no network but apt and pip, and names no mirror: both are used as the machine has them configured.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
venv=$root/.venv

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }
die() { say "$*"; exit 1; }

# need_packages NAME...: installs what is missing of these Debian packages, or says what an administrator must install.
need_packages() {
    command -v dpkg-query >/dev/null || { say "no Debian: please see that there is an equivalent of: $*"; return 0; }
    local missing=() name
    for name in "$@"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null) == installed ]] || missing+=("$name")
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    [[ $EUID -eq 0 ]] || die "missing packages; as root, run: apt-get update && apt-get install ${missing[*]}"
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update && apt-get -qq -y install --no-install-recommends "${missing[@]}" >&2 </dev/null ||
        die "apt-get could not install ${missing[*]}; see above"
}

recent_python() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# The system's interpreter first: tests run children as uid 1000, which cannot reach one in somebody's home.
choose_python() {
    local python
    for python in /usr/bin/python3 python3; do
        python=$(command -v "$python") && recent_python "$python" && { echo "$python"; return; }
    done
    die "no Python >= 3.11 with venv, neither /usr/bin/python3 nor python3 on PATH"
}

# A .venv is good for one place, one interpreter, one pyproject.toml and one set of extras: this names all four.
stamp_of() { # PYTHON EXTRAS
    { echo "$root $2"; "$1" -c 'import sys; print(sys.base_prefix, sys.version)'; cat "$root/pyproject.toml"; } | sha256sum
}

same_interpreter() { # PYTHON: does the existing .venv run on it, and lie where it was made?
    local probe='import sys; print(sys.base_prefix, sys.version)'
    [[ -x $venv/bin/python && $("$venv/bin/python" -c "$probe" 2>/dev/null) == "$("$1" -c "$probe")" ]] &&
        grep -qsF "'$venv/bin/" "$venv/bin/pip" || head -n 1 "$venv/bin/pip" 2>/dev/null | grep -qF "$venv/bin/"
}

# make_venv [EXTRAS]: .venv with the package (editable) and these extras. Quick when nothing changed.
make_venv() {
    local extras=${1:-} python lock
    python=$(choose_python)
    exec {lock}<"$root" && flock "$lock" # two scripts at once must not both build it
    if ! { venv_is_good "$python" "$extras"; }; then
        umask 022 # readable for uid 1000, whatever the caller's umask
        same_interpreter "$python" || { say "making $venv with $python"; "$python" -m venv --clear "$venv"; }
        say "installing the package${extras:+ with its extras: $extras}"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root${extras:+[$extras]}" </dev/null >&2
        stamp_of "$python" "$extras" >"$venv/.pisupervisor-${extras:-plain}"
    fi
    exec {lock}<&-
}

venv_is_good() { # PYTHON EXTRAS; the test extras hold all that the plain install needs
    local kind
    [[ -x $venv/bin/python ]] || return 1
    for kind in "$2" test; do
        [[ $(stamp_of "$1" "$kind") == "$(cat "$venv/.pisupervisor-${kind:-plain}" 2>/dev/null)" ]] && return 0
    done
    return 1
}
