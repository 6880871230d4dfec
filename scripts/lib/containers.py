"""What scripts/container-test runs: WORK BASE ENGINE..., or WORK --remove.

Each engine is one of its own, below WORK: nothing of the machine's engines is touched. Three things are tried in it: the
recipes of examples/deploy, each of their privileges left out (which must end in an error that says so), and the engine's
defaults, from where the errors' advice is followed until a child answers.
"""

from __future__ import annotations

import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

DEGRADE = ["memory", "swap", "cpus", "pids"]
APP = ["/opt/app/bin/python", "-m", "app"]
ROOT_LAUNCH = ["--cap-add", "SETUID", "--cap-add", "SETGID"]
FOR_ENTRYPOINT = ["--cap-add", "CHOWN", *ROOT_LAUNCH, "--cap-add", "SYS_ADMIN"]


class Engine:
    """Runs commands of one engine. ``unmask``: its switch for a /proc with nothing mounted over it."""

    name: str
    unmask: str
    command: list[str]
    environment: dict[str, str]

    def __init__(self, work: Path) -> None:
        self.work, self.context = work, work / "context"

    def __call__(self, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *words], env=self.environment, cwd=self.work, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def must(self, *words: str) -> str:
        done = self(*words)
        if done.returncode:
            raise SystemExit(f"{self.name} {shlex.join(words)}:\n{done.stderr}{done.stdout}")
        return done.stdout

    def run(self, options: Sequence[str], command: Sequence[str]) -> str:
        """What a container printed, stdout and stderr."""
        done = self("run", "--rm", "--network", "none", *options, "app", *command)
        return done.stdout + done.stderr

    def build(self, base: str) -> None:
        self.must("import", base, "docker.io/library/debian:12-slim")
        self.must("build", "--network", "host", "--tag", "app", str(self.context))

    def version(self) -> str:
        return self.must("version", "--format", "{{.Server.Version}}").strip()


class Podman(Engine):
    name = "podman"
    unmask = "unmask=/proc/*"

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        self.home = work / "podman"
        (self.home / "run").mkdir(parents=True, mode=0o700)
        self.runtime = self._unmasking_runtime()
        config = self.home / "containers.conf"
        # Podman raises these, which takes CAP_SYS_RESOURCE; and crun refuses a hybrid cgroup tree.
        files = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 1 << 16)
        config.write_text(
            f'[containers]\ndefault_ulimits = ["nofile={files}:{files}", "nproc=8192:8192"]\n'
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "runc"\n'
            f'[engine.runtimes]\nunmasked = ["{self.runtime}"]\n'
        )
        self.environment = {**os.environ, "CONTAINERS_CONF": str(config), "XDG_RUNTIME_DIR": str(self.home / "run")}
        self.command = [
            "podman", "--root", f"{self.home}/storage", "--runroot", f"{self.home}/run/own", "--tmpdir",
            f"{self.home}/run/libpod", "--storage-driver", "overlay",
        ]  # fmt: skip

    def version(self) -> str:
        return self.must("version", "--format", "{{.Client.Version}}").strip()

    def _unmasking_runtime(self) -> Path:
        """runc for procMount: Unmasked, which Podman's kube play knows from 4.7 on."""
        path = self.home / "unmasked"
        path.write_text(
            f"#!{sys.executable}\nimport json, os, sys\nwords = sys.argv[1:]\n"
            "if '--bundle' in words:\n"
            "    path = words[words.index('--bundle') + 1] + '/config.json'\n"
            "    with open(path) as file: spec = json.load(file)\n"
            "    spec['linux'].update(maskedPaths=[], readonlyPaths=[])\n"
            "    with open(path, 'w') as file: json.dump(spec, file)\n"
            "os.execvp('runc', ['runc', *words])\n"
        )
        path.chmod(0o755)
        return path

    def play(self) -> str:
        """The pod's log. Podman 4.3 finds the profile by an older word, and its ids in /etc/subuid, for "containers"."""
        text = (self.context / "pod.yaml").read_text()
        older = "annotations: {seccomp.security.alpha.kubernetes.io/pod: localhost/seccomp.json}"
        pod = self.work / "pod.yaml"
        pod.write_text(text.replace("metadata:\n", f"metadata:\n  {older}\n", 1))
        where = f"--seccomp-profile-root={self.context}"
        with _ids_for_pods():
            played = self("--runtime", "unmasked", "kube", "play", "--network", "none", where, str(pod))
            self("wait", "app-app", timeout=60)
            log = self("logs", "app-app")
            self("kube", "down", str(pod))
        return played.stderr + log.stdout + log.stderr


@contextmanager
def _ids_for_pods() -> Iterator[None]:
    files = [Path("/etc/subuid"), Path("/etc/subgid")]
    before = [file.read_text() if file.exists() else "" for file in files]
    if any("containers:" in text for text in before):
        yield
        return
    for file, text in zip(files, before, strict=True):
        file.write_text(f"{text}containers:1879048192:1048576\n")
    try:
        yield
    finally:
        for file, text in zip(files, before, strict=True):
            file.write_text(text)


class Docker(Engine):
    name = "docker"
    unmask = "systempaths=unconfined"

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        self.home = work / "docker"
        self.home.mkdir()
        (self.home / "daemon.json").write_text("{}")
        socket = f"unix://{self.home}/socket"
        self.command = ["/usr/bin/docker" if os.path.exists("/usr/bin/docker") else "docker", "--host", socket]
        self.environment = {**os.environ, "DOCKER_BUILDKIT": "0"}
        with (self.home / "log").open("w") as log:
            self.daemon = subprocess.Popen(
                [
                    "dockerd", "--data-root", f"{self.home}/data", "--exec-root", f"{self.home}/exec", "--pidfile",
                    f"{self.home}/pid", "--host", socket, "--iptables=false", "--ip6tables=false", "--bridge=none",
                    "--config-file", f"{self.home}/daemon.json", "--exec-opt", "native.cgroupdriver=cgroupfs",
                ],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while self("version").returncode:
            if time.monotonic() > deadline or self.daemon.poll() is not None:
                raise SystemExit(f"dockerd does not start:\n{(self.home / 'log').read_text()[-2000:]}")
            time.sleep(0.3)


ENGINES = {"podman": Podman, "docker": Docker}


# --- what is tried ------------------------------------------------------------------------------------------------


class Tally:
    """Prints a line for each thing that was tried, and counts what was not as it should be."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, what: str, said: str, *wanted: str) -> None:
        missing = [words for words in wanted if words not in said]
        print(f"{'FAILED' if missing else 'ok':7} {what}", flush=True)
        if missing:
            self.failed += 1
            print(f"        {missing} not in:\n" + "\n".join(f"        | {line}" for line in said.splitlines()[-8:]))


def recipes(engine: Engine) -> dict[str, tuple[list[str], list[str]]]:
    """The two of the Dockerfile: options and command."""
    common = [
        "--read-only",
        "--security-opt",
        f"seccomp={engine.context}/seccomp.json",
        "--security-opt",
        engine.unmask,
    ]
    walls = ["--user", "1000", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", *common]
    limits = ["--cap-drop", "ALL", *FOR_ENTRYPOINT, "--cgroupns", "private", *common]
    return {"walls": (walls, [*APP, *DEGRADE]), "limits": (limits, APP)}


WALLS = tuple(
    f"\n{name}: holds" for name in
    ("user", "mount", "pid", "network", "ipc", "uts", "cgroup", "time", "landlock", "seccomp", "capabilities")
)  # fmt: skip
LIMITS = ("\nmemory: holds", "\ncpus: holds", "\npids: holds")


def try_recipes(engine: Engine, tally: Tally) -> None:
    for name, (options, command) in recipes(engine).items():
        if name == "limits" and os.geteuid():
            continue  # nobody gives an ordinary user's engine a cgroup v1 tree
        said = engine.run(options, command)
        tally(
            f"{engine.name}: {name}, as in the Dockerfile",
            said,
            "answer: 42",
            *WALLS,
            *(LIMITS if name == "limits" else ()),
        )
        doctor = engine.run(["--tmpfs", "/tmp", *options], [APP[0], "-m", "pisupervisor", "doctor"])
        proved = tuple(f"{wall} " for wall in ("user", "mount", "pid", "network", "seccomp", "capabilities"))
        held = "\n".join(line for line in doctor.splitlines() if re.match(r"  \w+ +holds ", line))
        tally(f"{engine.name}: {name}, the doctor proves the walls", held or doctor, *proved)


def without(options: list[str], *words: str) -> list[str]:
    """``options`` without the pair (--option, value) that ends in these words."""
    pairs = [options[at : at + 2] for at, word in enumerate(options) if word in ("--cap-add", "--security-opt")]
    gone = next(pair for pair in pairs if any(word in pair[1] for word in words))
    at = next(at for at in range(len(options)) if options[at : at + 2] == gone)
    return options[:at] + options[at + 2 :]


def try_less(engine: Engine, tally: Tally) -> None:
    """Every privilege of the recipes left out: none of them is there in vain, and the error says what is missing."""
    (walls, with_degrade), (limits, plain) = recipes(engine).values()
    filter_refuses = engine.run(without(walls, "seccomp="), with_degrade)
    tally(
        f"{engine.name}: without the profile",
        filter_refuses,
        "launch failed at step",
        "--security-opt seccomp=unconfined",
    )
    masked = engine.run(without(walls, engine.unmask), with_degrade)
    tally(f"{engine.name}: with masks over /proc", masked, "launch failed at step 'mounts'", engine.unmask)
    if os.geteuid():
        return
    for capability, said in (
        ("SYS_ADMIN", "Read-only file system"), ("CHOWN", "Permission denied"), ("SETUID", "setpriv: "),
        ("SETGID", "setpriv: "),
    ):  # fmt: skip
        told = engine.run(without(limits, capability), plain)
        told = told if "answer: 42" not in told else "it works without"
        tally(f"{engine.name}: the entrypoint without CAP_{capability}", told, said)


#: what errors say: "docker or podman run --OPTION VALUE ...", "docker run ...", "as root ...: mount ..."
_RUN = re.compile(r"(docker or podman|docker|podman) run ((?:--[a-z-]+ (?:'[^']+'|[^\s;,)]+) ?)+)")
_MOUNT = re.compile(r"mount -o remount,bind,rw [^\s;,)]+")


def advised(engine: Engine, said: str, *, as_user: bool) -> list[str]:
    """The options for this engine that an error names: those of the first alternative, or all but to be another user."""
    text = re.sub(r"\s+", " ", said.rpartition("remedy:")[2])
    told = dict.fromkeys(options.strip() for who, options in _RUN.findall(text) if engine.name in who)
    found = [shlex.split(options) for options in told]
    if as_user:
        return found[0] if found else []
    return [word for options in found if "--user" not in options and "--privileged" not in options for word in options]


def follow(engine: Engine, tally: Tally, degrade: Sequence[str], *, as_user: bool) -> None:
    """From the engine's defaults, by nothing but what the errors say."""
    options: list[str] = ["--entrypoint", "/bin/sh"]
    before: list[str] = []
    for step in range(1, 9):
        script = " && ".join([*before, shlex.join(["exec", *APP, *degrade])])
        said = engine.run(options, ["-c", script])
        if "answer: 42" in said:
            break
        mounts = [mount for mount in _MOUNT.findall(said) if mount not in before]
        more = advised(engine, said, as_user=as_user)
        more = [] if set(more) <= set(options) else more
        print(f"        error {step} says: {shlex.join(more)} {'; '.join(mounts)}")
        if not more and not mounts:
            break
        before, options = before + mounts, [*more, *options]
    goal = f"{'walls' if degrade else 'limits, too'}, as {'an ordinary user' if as_user else 'root'}"
    tally(f"{engine.name}: by the errors' advice alone: {goal}", said, "answer: 42")


def examine(engine: Engine, base: str, tally: Tally) -> None:
    begun = time.monotonic()
    engine.build(base)
    print(f"{engine.name} {engine.version()}: the image was built in {time.monotonic() - begun:.0f} s")
    try_recipes(engine, tally)
    try_less(engine, tally)
    follow(engine, tally, DEGRADE, as_user=True)
    follow(engine, tally, DEGRADE, as_user=False)
    if os.geteuid() == 0:
        follow(engine, tally, [], as_user=False)
    if isinstance(engine, Podman) and os.geteuid() == 0:
        tally("podman: pod.yaml by kube play, in a user namespace", engine.play(), "answer: 42", *WALLS)


# --- the end ------------------------------------------------------------------------------------------------------


def stop(engine: Engine) -> None:
    if isinstance(engine, Docker):
        engine.daemon.send_signal(signal.SIGTERM)
        engine.daemon.wait(30)
    else:
        engine("rm", "--all", "--force")
        engine("system", "migrate")  # which ends the process that keeps an ordinary user's namespace


def remove(work: Path) -> None:
    """Mounts, groups that the engines made and left empty, then the folder."""
    with open("/proc/self/mountinfo") as file:
        points = [line.split(" ")[4] for line in file]
    for point in reversed(points):
        if point.startswith(f"{work}/"):
            subprocess.run(["umount", "--lazy", point], check=False)
    if os.geteuid() == 0:
        for group in ("libpod_parent", "docker"):
            for path in [Path("/sys/fs/cgroup") / group, *Path("/sys/fs/cgroup").glob(f"*/{group}")]:
                for folder in sorted(path.rglob("*/"), reverse=True) if path.is_dir() else ():
                    _rmdir(folder)
                _rmdir(path)
        shutil.rmtree(work)
    else:  # files of ids that are not ours
        subprocess.run(["unshare", "--map-root-user", "--map-auto", "rm", "-rf", str(work)], check=True)


def _rmdir(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        pass  # it is not there, or in use by an engine of the machine's


def main() -> int:
    work, *words = sys.argv[1:]
    if words == ["--remove"]:
        remove(Path(work))
        return 0
    tally = Tally()
    base, *names = words
    for name in names:
        engine = ENGINES[name](Path(work))
        try:
            examine(engine, base, tally)
        finally:
            stop(engine)
    print(f"{tally.failed} failed" if tally.failed else "all as it should be")
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
