"""One VM: boot a kernel with the image, run a command in a copy of a directory, bring its status and files back.

Emulated by QEMU (TCG): neither KVM nor any privilege is needed, and the machine's own kernel and cgroups do not matter.
A kernel that gets stuck panics, which ends the VM without a report. The guest's clock is the HPET: QEMU hands the
machine's own time stamp counter through, which jumps where that machine is itself suspended (guests got stuck by it).

As a program, machine.py ARCH KERNEL-DIRECTORY IMAGE: the first boot of an image that was only unpacked so far.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MODES = {
    "root": "uid 0, system service with Delegate=yes",
    "user": "uid 1000, service of the user's systemd with Delegate=yes",
    "user-scope": "uid 1000, scope of the user's systemd with Delegate=yes",
    "user-stock": "like user, with the controllers that Debian 12 hands to a user's systemd: no io, no cpuset",
    "user-plain": "uid 1000 with a systemd of its own, in a group that is not delegated",
    "bare": "uid 0, no systemd, root of the cgroup tree",
    "bare-user": "uid 1000, no systemd, nothing delegated",
    "container": "root with a container's capabilities, cgroup tree read-only",
    "container-user": "uid 1000 in such a container",
    "container-priv": "root with all capabilities in a container's namespaces, cgroup tree writable",
}
TIMEOUT, NO_REPORT = 124, 125
_WITHOUT_SYSTEMD = ("bare", "container")  # modes that begin so
_NOT_COPIED = (".git", "__pycache__", ".venv*", ".tox", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis")
_KERNEL_ARGUMENTS = """
    quiet loglevel=4 panic=-1 softlockup_panic=1 sysctl.kernel.panic_on_rcu_stall=1
    nokaslr mitigations=off audit=0 selinux=0 apparmor=0 random.trust_cpu=1
    cgroup_no_v1=all systemd.unified_cgroup_hierarchy=1 systemd.show_status=0 systemd.log_target=null
"""
_MIB = 1 << 20
_REPORT_SIZE = 4096  # the guest's one line of report, at the start of its output disk; a tar follows
_OUTPUT_SIZE = 64 * _MIB
_TOOLS = ("mke2fs", "setpriv", "tar")
_FIRST_BOOT_SECONDS = 1200.0


@dataclass(frozen=True, kw_only=True)
class Arch:
    """``console``: where kernel and init write; ``said``: the device whose lines the command's output becomes."""

    machine: str
    console: str
    said: tuple[str, ...]
    kernel_arguments: str = ""

    def arguments(self) -> list[str]:
        return [f"console={self.console}", f"systemd.mask=dev-{self.console}.device", *self.kernel_arguments.split()]


ARCHES = {
    "x86_64": Arch(
        machine="q35", console="ttyS0", said=("-serial", "stdio"),
        kernel_arguments="nopti tsc=unstable clocksource=hpet",
    ),
    "aarch64": Arch(
        machine="virt", console="ttyAMA0",
        said=("-device", "virtio-serial-pci", "-chardev", "stdio,id=said", "-device", "virtconsole,chardev=said"),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """``status``: the command's, or TIMEOUT or NO_REPORT; ``seconds``: the whole VM; ``console``: the end of its text."""

    status: int
    seconds: float
    console: str = ""


def missing_tools(arch: str, which: Callable[[str], str | None] = shutil.which) -> list[str]:
    return [tool for tool in (f"qemu-system-{arch}", *_TOOLS) if not which(tool)]


def run(images: Path, arch: str, kernel: str, mode: str, project: Path, command: str, *, output: Path, timeout: float,
        say: Callable[[str], None]) -> Outcome:  # fmt: skip
    """``command`` goes to a shell in a copy of ``project``; what it leaves in $VM_OUT comes back in ``output``; each line
    that it writes is given to ``say``.
    """
    with tempfile.TemporaryDirectory(prefix="pisupervisor-vm-") as name:
        work = Path(name)
        _make_job_disk(work / "job.disk", project, command)
        _make_empty_disk(work / "out.disk", _OUTPUT_SIZE)
        begun = time.monotonic()
        init = "/usr/local/sbin/bare-init" if mode.startswith(_WITHOUT_SYSTEMD) else "/sbin/init"
        disks = [(images / "image.ext4", "on"), (work / "job.disk", "off"), (work / "out.disk", "off")]
        qemu = _qemu_command(arch, images / kernel, disks, work, [f"vmjob.init={init}", f"vmjob.mode={mode}"])
        finished = _run_qemu(qemu, work, timeout, say)
        seconds = time.monotonic() - begun
        status = _read_status(work / "out.disk") if finished else TIMEOUT
        if status not in (TIMEOUT, NO_REPORT):
            _unpack_files(work / "out.disk", output)
        return Outcome(status=status, seconds=seconds, console=_console(work))


def _console(work: Path) -> str:
    try:
        return (work / "console").read_text(errors="replace")[-6000:]
    except FileNotFoundError:
        return ""  # QEMU did not even start


def _make_job_disk(path: Path, project: Path, command: str) -> None:
    """An ext4 disk with cmd and project/, and as much room again as they take plus 256 MiB."""
    tree = path.with_suffix(".d")
    tree.mkdir()
    (tree / "cmd").write_text(command + "\n")
    shutil.copytree(project, tree / "project", symlinks=True, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    used = sum(4096 + file.lstat().st_size for file in tree.rglob("*"))
    _make_empty_disk(path, 2 * used + 256 * _MIB)
    make = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", tree, path]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)


def _make_empty_disk(path: Path, size: int) -> None:
    with open(path, "wb") as disk:
        disk.truncate(size)


def _accelerator(arch: str) -> list[str]:
    """KVM only on real VT-x or SVM: a /dev/kvm without either flag in cpuinfo may not run a stock kernel."""
    flags = Path("/proc/cpuinfo").read_text().split()
    usable = arch == "x86_64" and ("vmx" in flags or "svm" in flags) and os.access("/dev/kvm", os.R_OK | os.W_OK)
    if usable:
        return ["-accel", "kvm", "-cpu", "host"]
    # One thread for both CPUs: with one each, 6.1 got stuck twice, both spinning, where limits were written
    # (setting a first quota patches the running scheduler). Two VMs at once use two cores just as well.
    return ["-accel", "tcg,thread=single,tb-size=512", "-cpu", "max"]


def _qemu_command(
    arch: str, kernel: Path, disks: list[tuple[Path, str]], work: Path, arguments: list[str]
) -> list[str]:
    """``disks`` become vda, vdb, ...: each with whether what the guest writes to it is thrown away ("on" or "off")."""
    own = ARCHES[arch]
    append = [*_KERNEL_ARGUMENTS.split(), *own.arguments(), *arguments]
    command = [
        f"qemu-system-{arch}", "-M", own.machine, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-m", "1024", "-smp", "2", *_accelerator(arch),
        "-kernel", str(kernel / "vmlinux"), "-initrd", str(kernel / "initrd.gz"), "-append", " ".join(append),
        "-serial", f"file:{work}/console", *own.said,
        "-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng",
    ]  # fmt: skip
    for number, (path, snapshot) in enumerate(disks):
        command += ["-drive", f"file={path},format=raw,if=none,id=d{number},cache=unsafe,snapshot={snapshot}"]
        command += ["-device", f"virtio-blk-pci,drive=d{number}"]
    return command


def _run_qemu(command: list[str], work: Path, timeout: float, say: Callable[[str], None]) -> bool:
    """Run to the end; False after a timeout. QEMU dies with us, however we end."""
    limited = ["timeout", "--signal=KILL", f"{timeout:.0f}", "setpriv", "--pdeathsig", "KILL", *command]
    environment = {**os.environ, "TMPDIR": str(work)}  # where snapshot=on writes
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *limited], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=environment, text=True, errors="replace",
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip())
        return process.wait() not in (124, 137, -9)  # timeout's own, by the signal that it was told to use
    finally:
        process.kill()
        process.communicate()


def _read_status(disk: Path) -> int:
    with open(disk, "rb") as source:
        words = source.read(_REPORT_SIZE).rstrip(b"\0").decode(errors="replace").split()
    if len(words) != 5 or words[0] != "vm-job" or words[4] != "ok":
        return NO_REPORT
    return int(words[1])


def _unpack_files(disk: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with open(disk, "rb", buffering=0) as source:
        source.seek(_REPORT_SIZE)
        subprocess.run(["tar", "-C", target, "--no-same-owner", "-xf", "-"], stdin=source, check=True)


def quoted(*words: str) -> str:
    """Words as one line of shell."""
    return shlex.join(words)


def first_boot(arch: str, kernel: Path, image: Path) -> str:
    """Boot ``image`` with guest/first-boot, which writes to it. Returns the console's end where that failed, else ""."""
    with tempfile.TemporaryDirectory(prefix="pisupervisor-vm-") as name:
        work = Path(name)
        qemu = _qemu_command(arch, kernel, [(image, "off")], work, ["vmjob.init=/usr/local/sbin/first-boot"])
        _run_qemu(qemu, work, _FIRST_BOOT_SECONDS, lambda line: print(line, file=sys.stderr))
        console = _console(work)
    return "" if "first-boot: done" in console else f"the image's first boot failed:\n{console}"


if __name__ == "__main__":
    sys.exit(first_boot(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])) or 0)
