# Sourced by all that is in scripts/: everything between a bare Debian 12 and a working .venv.
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

# Where a .venv lies and what it runs on: another place or interpreter means making it anew.
origin_of() { echo "$venv $("$1" -c 'import sys; print(sys.base_prefix, sys.version)')"; }

# What is installed in it: pyproject.toml says it all.
content_of() { echo "${1:-plain} $(sha256sum <"$root/pyproject.toml")"; }

installed() { grep -qsxF "$(content_of "$1")" "$venv/.pisupervisor-installed"; }

# make_venv [EXTRAS]: .venv with the package (editable) and these extras. Quick when nothing changed.
make_venv() {
    local extras=${1:-} python lock
    python=$(choose_python)
    exec {lock}<"$root" && flock "$lock" # two scripts at once must not both build it
    umask 022                            # readable for uid 1000, whatever the caller's umask
    if [[ ! -x $venv/bin/python || $(origin_of "$python") != "$(cat "$venv/.pisupervisor-origin" 2>/dev/null)" ]]; then
        say "making $venv with $python"
        "$python" -m venv --clear "$venv"
        origin_of "$python" >"$venv/.pisupervisor-origin"
    fi
    # The test extras hold all that the plain install needs.
    installed "$extras" || installed test || install_package "$extras"
    exec {lock}<&-
}

install_package() {
    say "installing the package${1:+ with its extras: $1}"
    # --use-pep517 is what newer pips do anyway; Debian 12's warns about the old way.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --use-pep517 --editable "$root${1:+[$1]}" </dev/null >&2
    content_of "$1" >"$venv/.pisupervisor-installed"
}
