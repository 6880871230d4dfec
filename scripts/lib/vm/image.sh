# shellcheck shell=bash
# Makes $out/image.ext4: Debian 12, systemd, Python 3.11, user dev (uid 1000), /opt/venv with the wanted packages.
# Uses $here, $out, $requirements, $python and log of build.sh.
# shellcheck disable=SC2154

guest_packages=systemd,systemd-sysv,dbus,dbus-user-session,libpam-systemd,python3,python3-venv,iproute2,procps
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
    local tree=$1 settings=$out/apt/transport.conf uri
    uri=$(repo_uri main)
    mkdir -p "$out/apt"
    apt_transport_settings >"$settings"
    mmdebstrap --quiet --variant=minbase --include="$guest_packages" \
        --aptopt='APT::Install-Recommends "false"' --aptopt="$settings" \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' bookworm "$tree" "$uri"
    # what came from this machine's apt does not belong in the image
    rm -rf "$tree"/etc/apt/apt.conf.d/99mmdebstrap "$tree"/etc/apt/sources.list* "$tree"/var/cache/apt/* "$tree"/var/lib/apt/lists/*
}

configure_tree() {
    local tree=$1 unit units=$1/etc/systemd/system
    chroot "$tree" useradd -m -u 1000 -s /bin/bash dev
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
    local tree=$1 file=$2
    chroot "$tree" python3 -m venv --without-pip /opt/venv
    "$python" -m pip install --quiet --disable-pip-version-check --no-warn-script-location --root-user-action=ignore \
        --target "$tree/opt/venv/lib/python3.11/site-packages" -r "$file" </dev/null >&2
    chroot "$tree" python3 -m compileall -q /usr/lib/python3.11 /opt/venv >/dev/null 2>&1 || true
}

build_image() {
    local tree=$out/tree key
    key=$(content_key "$requirements" "${BASH_SOURCE[0]}" "$here"/guest/*)
    [[ ! -s $out/image.ext4 || $(cat "$out/image.key" 2>/dev/null) != "$key" ]] || return 0
    rm -rf "$tree"
    make_tree "$tree";                           log "Debian tree"
    configure_tree "$tree"
    install_requirements "$tree" "$requirements"; log "Python packages"
    mke2fs -q -F -t ext4 -O ^has_journal -m 0 -d "$tree" "$out/image.new" 1500M
    rm -rf "$tree"
    mv "$out/image.new" "$out/image.ext4"
    echo "$key" >"$out/image.key";               log "image.ext4"
}
