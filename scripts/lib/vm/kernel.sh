# shellcheck shell=bash
# Makes $out/NAME/{vmlinux,vmlinuz,initrd.gz,version} from a Debian kernel package.
# Uses $here, $out, $python, $arch, $deb_arch, $foreign, die and log of build.sh.
# shellcheck disable=SC2154

# Loaded by the initramfs. The root image holds no modules, so what is not built in and not here does not exist in the VM.
guest_modules=(ext4 virtio_pci virtio_blk virtio_console crc32c_generic overlay veth)

# kernel_packages SUITE META: the packages with the image and the modules (newer kernels are split)
kernel_packages() {
    local suite=$1 image
    image=$(apt_depends "$suite" "$2" '^linux-image-[0-9]' | head -n 1)
    [ -n "$image" ] || die "$2 of $suite names no kernel"
    echo "$image"
    apt_depends "$suite" "$image" '^linux-(base|binary|modules|image)-[0-9]'
}

# fetch_kernel NAME SUITE META: .debs kept in $out/debs/NAME; while they lie there the kernel is pinned
fetch_kernel() {
    local name=$1 suite=$2 meta=$3 list packages
    if compgen -G "$out/debs/$name/*.deb" >/dev/null; then return; fi
    apt_prepare "$suite"
    list=$(kernel_packages "$suite" "$meta")
    mapfile -t packages <<<"$list"
    rm -rf "$out/debs/$name.new"
    apt_download "$suite" "$out/debs/$name.new" "${packages[@]}"
    mv "$out/debs/$name.new" "$out/debs/$name"
}

# guest_busybox: the path of a static busybox for the guest
guest_busybox() {
    [[ -n $foreign ]] || { echo /bin/busybox; return; }
    if [[ ! -x $out/busybox/bin/busybox ]]; then
        apt_prepare bookworm
        apt_download bookworm "$out/debs/busybox" busybox-static
        dpkg-deb -x "$out"/debs/busybox/*.deb "$out/busybox"
    fi
    echo "$out/busybox/bin/busybox"
}

# make_initramfs TREE VERSION RESULT: busybox, our init and the modules, unpacked, in the order of loading
make_initramfs() {
    local tree=$1 version=$2 result=$3 work=$3.d module file name busybox
    busybox=$(guest_busybox)
    rm -rf "$work"; mkdir -p "$work/bin" "$work/modules"
    cp "$busybox" "$work/bin/"
    install -m 755 "$here/guest/initramfs-init" "$work/init"
    for module in "${guest_modules[@]}"; do                 # one that is built in or absent prints nothing
        modprobe -d "$tree" -S "$version" --show-depends "$module" 2>/dev/null || true
    done | awk '$1 == "insmod" && !seen[$2]++ {print $2}' | while read -r file; do
        name=$(basename "$file")
        case $name in
            *.xz)  name=${name%.xz};  xz -dc "$file" ;;
            *.zst) name=${name%.zst}; zstd -qdc "$file" ;;
            *)     cat "$file" ;;
        esac >"$work/modules/current"
        mv "$work/modules/current" "$work/modules/$name"
        echo "$name"
    done >"$work/modules.order"
    (cd "$work" && find . | cpio -o -H newc --quiet | gzip -1) >"$result"
    rm -rf "$work"
}

build_kernel() {
    local name=$1 suite meta dir=$out/$1 tree=$out/$1/tree deb version image
    local key
    key=$(content_key "${BASH_SOURCE[0]}" "$here/guest/initramfs-init")
    [[ ! -s $dir/initrd.gz || $(cat "$dir/key" 2>/dev/null) != "$key" ]] || return 0
    read -r _ suite meta _ < <(awk -v n="$name" '$1 == n' "$here/kernels.txt") || die "no kernel $name in kernels.txt"
    fetch_kernel "$name" "$suite" "$meta-$deb_arch"
    rm -rf "$tree"; mkdir -p "$tree"
    for deb in "$out/debs/$name"/*.deb; do dpkg-deb -x "$deb" "$tree"; done
    if [ ! -d "$tree/lib/modules" ]; then mkdir -p "$tree/lib"; ln -s ../usr/lib/modules "$tree/lib/modules"; fi
    version=$(basename "$(echo "$tree"/lib/modules/*)")
    image=$(find "$tree" -name 'vmlinuz*' -type f | head -n 1)
    cp "$image" "$dir/vmlinuz"
    if [[ $arch == x86_64 ]]; then "$python" "$here/extract_vmlinux.py" "$dir/vmlinuz" "$dir/vmlinux"
    else cp "$image" "$dir/vmlinux"; fi                     # QEMU starts it as it is
    depmod -b "$tree" "$version"
    make_initramfs "$tree" "$version" "$dir/initrd.new"
    echo "$version" >"$dir/version"
    rm -rf "$tree"
    mv "$dir/initrd.new" "$dir/initrd.gz"
    echo "$key" >"$dir/key"                                 # last: it marks the kernel as complete
    log "kernel $name = $version"
}
