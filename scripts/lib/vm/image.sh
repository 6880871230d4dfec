# shellcheck shell=bash
# Makes $out/image.ext4: Debian 12, systemd, Python 3.11, user dev (uid 1000), /opt/venv with the wanted packages.
# Uses $here, $out, $requirements, $python, $deb_arch, $foreign, die and log of build.sh.
# Where this machine cannot run the guest's programs, the packages are unpacked here, and what must run there is run by the
# guest, once, when it first boots: guest/first-boot.
# shellcheck disable=SC2154

guest_packages=systemd,systemd-sysv,dbus,dbus-user-session,libpam-systemd,python3,iproute2,procps
guest_packages=$guest_packages,util-linux,libseccomp2,libcap2-bin,uidmap,strace,e2fsprogs

# Not wanted in a VM that lives for seconds
masked_units=(
    getty.target systemd-udev-trigger.service systemd-udevd.service systemd-udevd-control.socket
    systemd-udevd-kernel.socket systemd-update-utmp.service systemd-update-utmp-runlevel.service
    systemd-random-seed.service systemd-machine-id-commit.service systemd-pcrphase.service
    systemd-hwdb-update.service ldconfig.service e2scrub_reap.service e2scrub_all.timer apt-daily.timer
    apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer systemd-tmpfiles-clean.timer dev-hugepages.mount
)

make_tree() {
    local tree=$1 settings=$out/apt/transport.conf uri how
    uri=$(repo_uri main)
    how=(--variant=minbase --include="$guest_packages")
    [[ -z $foreign ]] || how=(--variant=extract --architectures="$deb_arch" --skip=cleanup/apt,download/empty
        --include="$guest_packages,python3-prctl,?essential,?priority(required)" --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr)
    mkdir -p "$out/apt"
    apt_transport_settings >"$settings"
    mmdebstrap --quiet "${how[@]}" \
        --aptopt='APT::Install-Recommends "false"' --aptopt="$settings" \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' bookworm "$tree" "$uri"
    [[ -z $foreign ]] || await_first_boot "$tree"
    # what came from this machine's apt does not belong in the image
    rm -rf "$tree"/etc/apt/apt.conf.d/99mmdebstrap "$tree"/etc/apt/sources.list* "$tree"/var/cache/apt/* "$tree"/var/lib/apt/lists/*
}

# in_tree TREE COMMAND...: at once, or when the guest first boots
in_tree() {
    local tree=$1; shift
    if [[ -z $foreign ]]; then chroot "$tree" "$@"; else echo "$*" >>"$tree/first-boot"; fi
}

# await_first_boot TREE: note each package as unpacked, so that the guest's dpkg runs what it wants to run when it is installed
await_first_boot() {
    local tree=$1 database=$1/var/lib/dpkg control deb name
    control=$tree/control
    for deb in "$tree"/var/cache/apt/archives/*.deb; do
        dpkg-deb -e "$deb" "$control"
        name=$(sed -n 's/^Package: //p' "$control/control")
        ! grep -q '^Multi-Arch: same' "$control/control" || name=$name:$deb_arch
        sed '/^Package:/a Status: install ok unpacked' "$control/control" >>"$database/status"
        echo >>"$database/status"
        rm "$control/control"
        (cd "$control" && for file in *; do [ ! -e "$file" ] || mv "$file" "../var/lib/dpkg/info/$name.$file"; done)
        dpkg-deb --fsys-tarfile "$deb" | tar -t | sed 's#^\./#/#; s#/$##; s#^$#/.#' >"$database/info/$name.list"
        rmdir "$control"
    done
    echo 1 >"$database/info/format"
    install -D -m 755 "$here/guest/first-boot" "$tree/usr/local/sbin/first-boot"
}

configure_tree() {
    local tree=$1 unit units=$1/etc/systemd/system
    in_tree "$tree" useradd -m -u 1000 -s /bin/bash dev
    mkdir -p "$tree/var/lib/systemd/linger"
    touch "$tree/var/lib/systemd/linger/dev"                # = loginctl enable-linger dev
    install -D -m 755 "$here/guest/vm-job" "$tree/usr/local/sbin/vm-job"
    install -D -m 755 "$here/guest/bare-init" "$tree/usr/local/sbin/bare-init"
    install -D -m 644 "$here/guest/vm-job.service" "$units/vm-job.service"
    install -D -m 644 "$here/guest/delegate.conf" "$units/user@.service.d/delegate.conf"
    for unit in "${masked_units[@]}"; do ln -sf /dev/null "$units/$unit"; done
    mkdir -p "$units/multi-user.target.wants"
    ln -sf ../vm-job.service "$units/multi-user.target.wants/vm-job.service"
    ln -sf multi-user.target "$units/default.target"
    echo vm >"$tree/etc/hostname"
    : >"$tree/etc/fstab"
    tr -d - </proc/sys/kernel/random/uuid >"$tree/etc/machine-id"
}

# install_requirements TREE FILE: pip of the host's Python 3.11; wheels and compiled extensions fit the guest's 3.11
install_requirements() {
    local tree=$1 file=$2 site=$1/opt/venv/lib/python3.11/site-packages pip
    pip=("$python" -m pip --quiet --disable-pip-version-check)
    in_tree "$tree" python3 -m venv --without-pip /opt/venv
    if [[ -z $foreign ]]; then
        "${pip[@]}" install --no-warn-script-location --root-user-action=ignore --target "$site" -r "$file" </dev/null >&2
    else
        install_foreign_wheels "$site" "$file"
        cp -r "$tree"/usr/lib/python3/dist-packages/{,_}prctl* "$site"
    fi
    "$python" -m compileall -q -s "$tree" -p / "$tree/usr/lib/python3.11" "$tree/opt/venv" >/dev/null 2>&1 || true
}

# install_foreign_wheels SITE FILE: what has no wheel is pure Python, of which one is made here, or Debian's (python-prctl)
install_foreign_wheels() {
    local site=$1 file=$2
    "${pip[@]}" wheel --no-deps --wheel-dir "$out/wheels" pyseccomp cgroupspy </dev/null >&2
    grep -v '^python-prctl' "$file" >"$out/wheels/requirements"
    "${pip[@]}" install --platform "manylinux2014_$arch" --platform "manylinux_2_28_$arch" --python-version 3.11 \
        --only-binary=:all: --find-links "$out/wheels" --target "$site" -r "$out/wheels/requirements" </dev/null >&2
}

# build_image KERNEL: with what KERNEL runs at the first boot, where that is not done here
build_image() {
    local tree=$out/tree kernel=$1 key
    key=$(content_key "$requirements" "${BASH_SOURCE[0]}" "$here"/guest/*)
    [[ ! -s $out/image.ext4 || $(cat "$out/image.key" 2>/dev/null) != "$key" ]] || return 0
    rm -rf "$tree"
    make_tree "$tree";                           log "Debian tree"
    configure_tree "$tree"
    install_requirements "$tree" "$requirements"; log "Python packages"
    mke2fs -q -F -t ext4 -O ^has_journal -m 0 -d "$tree" "$out/image.new" 1500M
    rm -rf "$tree"
    if [[ -n $foreign ]]; then
        "$python" "$here/machine.py" "$arch" "$out/$kernel" "$out/image.new" || die "no image"
        log "packages configured in the guest"
    fi
    mv "$out/image.new" "$out/image.ext4"
    echo "$key" >"$out/image.key";               log "image.ext4"
}
