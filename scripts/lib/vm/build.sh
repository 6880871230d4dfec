#!/usr/bin/env bash
# build.sh DIRECTORY ARCH REQUIREMENTS PYTHON KERNEL...: what machine.py boots: DIRECTORY/image.ext4, and for each KERNEL
# of kernels.txt DIRECTORY/KERNEL/, all of it for ARCH (x86_64 or aarch64). What is there already stays, the image as long
# as nothing that it is made of changed.
# Needs root (chroot) and Debian 12: PYTHON's pip installs REQUIREMENTS into the guest, so versions and libc must fit.
set -euo pipefail

die() { echo "vm-test: $*" >&2; exit 1; }
log() { echo "vm-test: ${SECONDS}s $*" >&2; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ $# -ge 5 ]] || die "build.sh DIRECTORY ARCH REQUIREMENTS PYTHON KERNEL..."
mkdir -p "$1"
out=$(cd "$1" && pwd)
arch=$2
requirements=$3
python=$4
shift 4
case $arch in x86_64) deb_arch=amd64 ;; aarch64) deb_arch=arm64 ;; *) die "no machine for $arch" ;; esac
foreign=                                        # whether programs of the guest cannot be run here
[[ $arch == "$(uname -m)" ]] || foreign=yes
[[ $EUID -eq 0 ]] || die "building the image needs root (chroot); once it is there, anybody can boot it"
[[ $(. /etc/os-release && echo "$ID-$VERSION_ID") == debian-12 ]] || die "needs Debian 12: the guest's Python must be the host's"

# shellcheck source=apt.sh
source "$here/apt.sh"
# shellcheck source=kernel.sh
source "$here/kernel.sh"
# shellcheck source=image.sh
source "$here/image.sh"

exec {lock}<"$out" && flock "$lock" # two at once must not both build it
for kernel; do build_kernel "$kernel"; done
build_image "$1"
