"""Checks of our own in the catalogue's form, for layers that no check of the catalogue falls without.

As there: the code prints ``B ...`` when it was held and ``E ...`` when it got out; ``needs`` are the single layers without
which it gets out.
"""

from __future__ import annotations

OWN: dict[str, dict[str, object]] = {
    "O01": {
        "title": "System V memory of the host", "mechanism": "IPC ns", "needs": ["ipc namespace"],
        "source": "ipc_namespaces(7); firejail #2723",
        "code": "deny(lambda:sc(29,0x70697370,4096,0o666),'ENOENT','EPERM')",
    },
    "O02": {
        "title": "the host's cgroup path", "mechanism": "cgroup ns, entered after the group is joined",
        "needs": ["cgroup namespace"], "source": "cgroup_namespaces(7); docker #40087",
        "code": "p={l.split(':',2)[2].strip() for l in open('/proc/self/cgroup')}; want(p<={'/'},p)",
    },
    "O03": {
        "title": "how long the host is up", "mechanism": "time ns with offsets", "needs": ["time namespace"],
        "source": "time_namespaces(7)",
        "code": "u=time.clock_gettime(time.CLOCK_BOOTTIME); want(u<60,u)",
    },
    "O04": {
        "title": "the host's name", "mechanism": "UTS ns", "needs": ["hostname"], "source": "runc spec",
        "code": "want(os.uname().nodename==HOSTNAME_STR,os.uname().nodename)",
    },
    "O05": {
        "title": "kill whoever started it by its group", "mechanism": "setsid", "needs": ["session"],
        "source": "bubblewrap CVE-2017-5226",
        "code": "want(os.getsid(0)==os.getpid()==os.getpgid(0),(os.getsid(0),os.getpid()))",
    },
    "O06": {
        "title": "abstract socket of the host where the network is shared", "mechanism": "Landlock scope (ABI 6)",
        "needs": ["landlock"], "source": "landlock(7); containerd CVE-2020-15257", "network": "host",
        "code": "deny(lambda:socket.socket(socket.AF_UNIX).connect('\\0pis_probe'),'EPERM')",
    },
    "O07": {
        "title": "memory beyond the limit, held by files in /dev/shm", "mechanism": "memory limit counts tmpfs",
        "needs": [], "source": "runc #2173",
        "code": "signal.signal(25,signal.SIG_IGN)\ndef f():\n    h=open('/dev/shm/x','wb',buffering=0)\n"
        "    for i in range(96): h.write(b'x'*(1<<20))\ndeny(f)",
    },
    "O08": {
        "title": "a file readable by all beneath the root's mounts", "mechanism": "pivot_root and umount of the old root",
        "needs": [], "source": "pivot_root(2); isolate 2.6",
        "code": "want(not any(os.path.exists(p+'HOSTDIR') for p in ('/','/proc/1/root/','/proc/self/root/','/proc/self/cwd/')))",
    },
    "O09": {
        "title": "watch who uses a shared ro inode", "mechanism": "seccomp inotify, fanotify, F_NOTIFY", "needs": ["seccomp"],
        "source": "inotify(7), fanotify(7): a watch on a file tells one box what another reads",
        "code": "import fcntl\nfd=os.open('/usr/lib',0)\ndenyall({'inotify':lambda:sc(254,sc(253),b'/usr/lib',1),"
        "'inotify_init1':lambda:sc(294,0),'fanotify':lambda:sc(300,0x200,0),'dnotify':lambda:fcntl.fcntl(fd,1026,1)})",
    },
    "O10": {
        "title": "where the host keeps what it shows", "mechanism": "the root is a detached mount tree", "needs": ["mount table"],
        "source": "mountinfo field 4; docker #38995: the layout of the host's storage is in every container's mountinfo",
        "code": "p=['self/mountinfo','self/mounts','self/mountstats','thread-self/mountinfo','self/task/%d/mounts'%os.getpid()]\n"
        "s=''.join(open('/proc/'+x).read() for x in p); want(not s,s[:200])",
    },
}  # fmt: skip
