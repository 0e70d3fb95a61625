#!/usr/bin/env bash
# Everything that `make` needs on a fresh Debian machine, each part by itself and quick when it is already there:
#
#   scripts/setup.sh packages [GROUP...]   Debian packages that are missing (default: required develop)
#   scripts/setup.sh venv                  .venv with Isolat (editable) and its tools
#   scripts/setup.sh native                the C programs
#   scripts/setup.sh launcher              .venv/bin/isolat and isolatd that start quickly
#   scripts/setup.sh guest                 the kernel and initramfs of machines, in the default state root
#   scripts/setup.sh image                 the image `debian` in the default state root
#
# What is there is looked at each time, so a stamp can't hide that somebody removed it.
set -euo pipefail
cd "$(dirname "$0")/.."
top=$PWD
venv=$top/.venv
stamps=$top/build/stamps
root=${ISOLAT_ROOT:-/var/lib/isolat}

say() { printf '== %s\n' "$*" >&2; }

fail() {
    printf 'setup: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2
    exit 125
}

need_root() {
    [ "$(id -u)" = 0 ] || fail "$1 needs root" "run it as root: sudo make ${MAKE_TARGET:-test}"
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Debian's own Python where it is new enough: it stays when a version manager's goes.
find_python() {
    local python
    for python in /usr/bin/python3 "$(command -v python3 || true)"; do
        if [ -n "$python" ] && is_new_enough "$python"; then
            echo "$python"
            return
        fi
    done
    return 1
}

apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$@" </dev/null >&2
}

setup_packages() {
    local groups=("$@") python missing
    [ ${#groups[@]} -gt 0 ] || groups=(required develop)
    if ! python=$(find_python); then
        need_root "installing Python"
        say "installing Python"
        apt update && apt install -y --no-install-recommends python3 python3-venv
        python=$(find_python) || fail "no Python 3.11 or newer is to be had here" "use Debian 12 or newer"
    fi
    missing=$(PYTHONPATH=$top/src "$python" -S -m isolat.setup.packages "${groups[@]}")
    [ -n "$missing" ] || return 0
    need_root "installing packages"
    command -v apt-get >/dev/null || fail "no apt-get here; missing: $(echo $missing)" "install them by this system's means"
    say "installing" $missing
    apt update
    # shellcheck disable=SC2086 # one word for each package
    apt install -y --no-install-recommends $missing
}

setup_venv() {
    local python wanted stamp=$stamps/venv
    python=$(find_python) || fail "no Python 3.11 or newer here" "scripts/setup.sh packages"
    wanted=$(cat pyproject.toml <(echo "$python $top") | sha256sum)
    if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && [ -x "$venv/bin/pytest" ]; then
        return
    fi
    say "making .venv with $python"
    "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[dev]'
    mkdir -p "$stamps"
    echo "$wanted" >"$stamp"
}

setup_native() {
    make --no-print-directory -s -C native
}

# `pip`'s console script costs 43 ms before the first line of ours; without site (-S) and the user's settings (-I) it
# is 7 ms. The source directory is all that the quick path needs; the slow one calls site.main() itself.
launcher() {
    local name=$1 module=$2 call=$3 path=$venv/bin/$1 text
    text="#!$venv/bin/python -IS
import sys

sys.path.insert(0, \"$top/src\")
from $module import $call

$call()"
    if [ "$(cat "$path" 2>/dev/null)" != "$text" ]; then
        rm -f "$path"
        printf '%s\n' "$text" >"$path.new"
        chmod 755 "$path.new"
        mv "$path.new" "$path"
    fi
}

setup_launcher() {
    launcher isolat isolat.cli.main entry
    launcher isolatd isolat.daemon.main entry
}

has_image() {
    local digest
    digest=$(sed -n "s/^ *\"$1\": *\"\([0-9a-f]*\)\".*/\1/p" "$root/images/names.json" 2>/dev/null)
    [ -n "$digest" ] && [ -s "$root/images/$digest.erofs" ] && [ -s "$root/images/$digest.json" ]
}

setup_image() {
    has_image debian:latest && return
    need_root "making an image"
    say "making the image debian from Debian's packages (half a minute)"
    "$venv/bin/isolat" --root "$root" image bootstrap debian >&2
    has_image debian:latest || fail "the image debian is still not in $root" "run: .venv/bin/isolat image bootstrap debian"
}

setup_guest() {
    need_root "making what machines boot from"
    "$venv/bin/python" -m isolat.guest "$root/guest" >&2
}

[ $# -gt 0 ] || fail "say what is to be set up" "packages, venv, native, launcher, image, guest"
part=$1
shift
case $part in
    packages | venv | native | launcher | image | guest) "setup_$part" "$@" ;;
    *) fail "there is nothing called $part to set up" "packages, venv, native, launcher, image, guest" ;;
esac
