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
        "title": "the host's clocks since boot", "mechanism": "time ns with offsets", "needs": ["time namespace"],
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
    "O11": {
        "title": "write to the page cache by the kernel's crypto", "mechanism": "seccomp: no AF_ALG socket",
        "needs": ["seccomp"], "source": "CVE-2026-31431 (Copy Fail: AF_ALG and splice, from any container)",
        "code": "deny(lambda:socket.socket(38,socket.SOCK_SEQPACKET,0),'EAFNOSUPPORT')",
    },
    "O12": {
        "title": "a namespace by its file handle", "mechanism": "seccomp: no handles; no capability to open one",
        "needs": ["seccomp"], "source": "CVE-2026-43391 (nsfs handles of others, Linux 6.18); Shocker",
        "code": "h=(ctypes.c_uint8*136)(128); n=ctypes.c_int()\n"
        "deny(lambda:sc(303,-100,b'/proc/self/ns/net',h,ctypes.byref(n),0x200),'EPERM')\n"
        "h=(ctypes.c_uint8*40)(16,0,0,0,0xf1)\nfor root in (-10002,-10003): deny(lambda:sc(304,root,h,0),'EPERM')",
    },
    "O13": {
        "title": "system calls of the last two years", "mechanism": "seccomp: ENOSYS for what no profile names",
        "needs": ["seccomp"],
        "source": "statmount, listmount and lsm_* (6.8), open_tree_attr and file_getattr (6.17), listns (6.18)",
        "code": "m=ctypes.create_string_buffer(4096); n=ctypes.c_uint32(4096)\n"
        "r=lambda *v:ctypes.byref((ctypes.c_uint64*4)(*v))\n"
        "for call in ((457,r(32,1,2),m,4096,0),(458,r(32,(1<<64)-1,0),m,8,0),(459,100,m,ctypes.byref(n),0),"
        "(461,m,ctypes.byref(n),0),(467,-100,b'/tmp',1,0,0),(468,-100,b'/tmp',m,24,0),(469,-100,b'/tmp',m,24,0),(470,r(40,0),m,8,0)):\n"
        "    deny(lambda:sc(*call),'ENOSYS','EPERM')",
    },
    "O14": {
        "title": "thousands of descriptors under way on UNIX sockets", "mechanism": "RLIMIT_NOFILE, counted for an id of its own",
        "needs": ["rlimits"], "source": "CVE-2025-40214, CVE-2021-0920: the collector of such sockets; unix(7) ETOOMANYREFS",
        "code": "import array\na,b=socket.socketpair(); a.setsockopt(1,7,1<<22); n=0; fds=array.array('i',[a.fileno()]*200)\n"
        "try:\n    while n<4000: a.sendmsg([b'x'],[(1,1,fds)],64); n+=200\nexcept OSError: pass\nwant(n<=600,n)",
    },
    "O15": {
        "title": "what a pidfd tells of the other end, and of PID 1", "mechanism": "pid ns; PID 1 is not dumpable", "needs": [],
        "source": "pidfd ioctls: PIDFD_GET_*_NAMESPACE (6.11), PIDFD_GET_INFO (6.13, with coredumps since 6.16)",
        "code": "import fcntl\nfd=os.pidfd_open(1); bad=[]\nfor n in range(1,11):\n"
        "    try: bad.append((n,fcntl.ioctl(fd,0xff00+n,0)))\n    except OSError: pass\n"
        "b=bytearray(72); struct.pack_into('Q',b,0,31)\ntry:\n    fcntl.ioctl(os.pidfd_open(os.getpid()),0xc048ff0b,b)\n"
        "    pid,tgid,ppid=struct.unpack_from('3I',b,16)\n"
        "    if (pid,ppid)!=(os.getpid(),os.getppid()): bad.append((pid,ppid))\n"
        "except OSError: pass\nwant(not bad,bad)",
    },
    "O16": {
        "title": "fanotify, which needs no privilege since 5.13", "mechanism": "seccomp", "needs": ["seccomp"],
        "source": "fanotify(7); mount notifications FAN_REPORT_MNT (6.15)",
        "code": "for flags in (0x200,0x4000,0xe00): deny(lambda:sc(300,flags,0),'EPERM','ENOSYS')",
    },
    "O17": {
        "title": "urgent data on a UNIX socket", "mechanism": "seccomp: no MSG_OOB", "needs": ["seccomp"],
        "source": "CVE-2025-38236: out of Chrome's renderer by MSG_OOB",
        "code": "a,b=socket.socketpair(); a.send(b'x')\n"
        "for f in (lambda:a.send(b'x',1),lambda:a.sendmsg([b'x'],[],1)): deny(f,'EOPNOTSUPP','ENOTSUP')",
    },
    "O18": {
        "title": "socket families that nobody needs here", "mechanism": "seccomp: UNIX, IPv4 and IPv6 alone",
        "needs": ["seccomp"], "source": "CVE-2026-43500 (Dirty Frag: AF_RXRPC, the page cache), CVE-2025-21756 (AF_VSOCK)",
        "code": "bad=[]\nfor f in range(3,64):\n    for t in (1,2,3,5):\n"
        "        try: bad+=[] if f==10 else [(f,socket.socket(f,t).family)]\n"
        "        except OSError as e: bad+=[] if e.errno==97 else [(f,e.errno)]\nwant(not bad,bad)",
    },
    "O19": {
        "title": "all inotify instances of whoever runs the host", "mechanism": "seccomp: no inotify", "needs": ["seccomp"],
        "source": "user_namespaces(7), fs.inotify.max_user_instances (128): what a user namespace uses counts to its maker, root",
        "code": "for call in ((294,0),(253,),(254,-1,b'/',1)): deny(lambda:sc(*call),'EPERM','ENOSYS')",
    },
    "O20": {
        "title": "the machine's memory for filters in machine code", "mechanism": "seccomp: no filters on sockets",
        "needs": ["seccomp"],
        "source": "net.core.bpf_jit_limit: one for all; what 2000 sockets took (50 MB) counts to no group",
        "code": "s=socket.socket(2,2); p=ctypes.create_string_buffer(struct.pack('HBBI',6,0,0,1))\n"
        "for o in (26,51): deny(lambda:s.setsockopt(1,o,struct.pack('HxxxxxxQ',1,ctypes.addressof(p))),'EPERM')",
    },
    "O21": {
        "title": "have the host write back all that it has changed", "mechanism": "seccomp: no sync, no syncfs",
        "needs": ["seccomp"], "source": "sync(2), syncfs(2): without privilege, on whatever file system a file is shown of",
        "code": "fd=os.open('/usr',0)\nfor call in ((162,),(306,fd)): deny(lambda:sc(*call),'EPERM')",
    },
    "O23": {
        "title": "keep waiting whoever opens a file", "mechanism": "seccomp: no leases", "needs": ["seccomp"],
        "source": "fcntl(2) F_SETLEASE, fs.lease-break-time (45 s): for a file's owner, on a descriptor that only reads",
        "code": "import fcntl\nopen('/tmp/leased','w').close(); fd=os.open('/tmp/leased',0)\n"
        "deny(lambda:fcntl.fcntl(fd,1024,0),'EPERM')",
    },
    "O22": {
        "title": "have the other threads of its core stand idle", "mechanism": "seccomp: no PR_SCHED_CORE",
        "needs": ["seccomp"], "source": "core-scheduling.rst (5.14): a cookie of one's own, without privilege",
        "code": "deny(lambda:sc(157,62,1,0,0,0),'EINVAL')",
    },
    "O24": {
        "title": "huge pages of the machine's pool", "mechanism": "seccomp: no MAP_HUGETLB, no MFD_HUGETLB",
        "needs": ["seccomp"], "source": "hugetlb.rst: counted by a controller of their own, by no memory limit",
        "code": "deny(lambda:mmap.mmap(-1,2<<20,flags=0x40022),'EPERM'); deny(lambda:os.memfd_create('x',4),'EPERM')",
    },
    "O25": {
        "title": "protocols that nobody needs here", "mechanism": "seccomp: no multipath TCP, SMC, SCTP, DCCP, L2TP",
        "needs": ["seccomp"],
        "source": "net-pf-2-proto-132: sctp, dccp, l2tp, smc are loaded for whoever asks; CVE-2025-40257 (MPTCP)",
        "code": "for f in (2,10):\n    for t,p in ((1,262),(1,256),(1,132),(5,132),(6,33),(2,115)):\n"
        "        deny(lambda:socket.socket(f,t,p),'EPROTONOSUPPORT','EAFNOSUPPORT')",
    },
    "O26": {
        "title": "the machine's memory for filters, by those on system calls", "mechanism": "seccomp: no further filters",
        "needs": ["seccomp"], "source": "as O20: 23 MB of machine code by 58 processes, counted to no group",
        "code": "f=ctypes.create_string_buffer(struct.pack('HBBI',6,0,0,0x7fff0000))\n"
        "p=ctypes.create_string_buffer(struct.pack('HxxxxxxQ',1,ctypes.addressof(f)))\n"
        "deny(lambda:sc(157,22,2,ctypes.addressof(p)),'EINVAL'); deny(lambda:sc(317,1,0,ctypes.addressof(p)),'EPERM')",
    },
    "O27": {
        "title": "kernel memory for NUMA policies", "mechanism": "seccomp: a kernel without NUMA", "needs": ["seccomp"],
        "source": "mbind(2): 576 bytes a policy, one for each second page, counted to no group",
        "code": "m=mmap.mmap(-1,8192); a=ctypes.addressof(ctypes.c_char.from_buffer(m)); n=ctypes.c_ulong(1)\n"
        "for call in ((237,a,4096,2,ctypes.byref(n),64,0),(238,2,ctypes.byref(n),64),(239,0,0,0,0,0)):\n"
        "    deny(lambda:sc(*call),'ENOSYS')",
    },
    "O28": {
        "title": "whether others have the same page", "mechanism": "seccomp: no MADV_MERGEABLE, PR_SET_MEMORY_MERGE",
        "needs": ["seccomp"],
        "source": "ksm.rst; Suzaki et al., EuroSec 2011; Razavi et al., Flip Feng Shui, USENIX Security 2016",
        "code": "m=mmap.mmap(-1,8192); deny(lambda:m.madvise(12),'EINVAL')\n"
        "deny(lambda:sc(157,67,1,0,0,0),'EINVAL')",
    },
    "O29": {
        "title": "protocols of the kernel's own on top of TCP", "mechanism": "seccomp: no TCP_ULP", "needs": ["seccomp"],
        "source": "CVE-2025-39682, CVE-2025-39946 (kernel TLS)",
        "code": "s=socket.socket()\nfor u in (b'tls',b'espintcp',b'smc'): deny(lambda:s.setsockopt(6,31,u),'EPERM')",
    },
    "O30": {
        "title": "keys for signed TCP segments, tunnels over UDP", "mechanism": "seccomp: no TCP_AO, TCP_MD5SIG, UDP_ENCAP",
        "needs": ["seccomp"],
        "source": "tcp_ao.rst (6.7): any hash of the kernel's crypto for whoever names it, as by AF_ALG (O11); 8 places in all",
        "code": "s=socket.socket(); a=struct.pack('HH4s120xBBHi80s',2,0,bytes(4),0,0,3,0,b'key')\n"
        "for o in (14,32,38): deny(lambda:s.setsockopt(6,o,a),'EPERM')\n"
        "deny(lambda:socket.socket(2,2).setsockopt(17,100,2),'EPERM')",
    },
    "O31": {
        "title": "throw files of others out of the page cache", "mechanism": "seccomp: no POSIX_FADV_DONTNEED",
        "needs": ["seccomp"],
        "source": "posix_fadvise(2) takes a descriptor that reads; Gruss et al., Page Cache Attacks, CCS 2019",
        "code": "fd=os.open('/usr/bin/env',0)\ndeny(lambda:os.posix_fadvise(fd,0,0,4),'EINVAL')\n"
        "m=mmap.mmap(-1,8192)\nfor a in (20,21): deny(lambda:m.madvise(a),'EINVAL')",
    },
    "O32": {
        "title": "kernel memory for access lists, and groups of IPv6",
        "mechanism": "seccomp: no long extended attributes, no IPV6_JOIN_GROUP", "needs": ["seccomp"],
        "source": "64 KiB for each list, two for a folder in tmpfs, charged to no group: 1 GB by 8190 folders",
        "code": "e=lambda t,i:struct.pack('<HHI',t,7,i)\n"
        "a=struct.pack('<I',2)+e(1,2**32-1)+e(2,os.getuid())*8000+b''.join(e(t,2**32-1) for t in (4,16,32))\n"
        "os.mkdir('/tmp/acl')\n"
        "for n in ('access','default'): deny(lambda:os.setxattr('/tmp/acl','system.posix_acl_'+n,a),'ENOTSUP')\n"
        "g=b'\\xff\\x02'+bytes(10)+b'test'; s=socket.socket(10,2); deny(lambda:s.setsockopt(41,20,g+struct.pack('i',1)),'EPERM')",
    },
    "O33": {
        "title": "have the kernel rewrite its code, and interrupt every core", "mechanism": "seccomp: no SO_TIMESTAMP, UDP_GRO",
        "needs": ["seccomp"], "source": "static keys, without a rate (as net.core's flow limit has): 34,000 interrupts a second",
        "code": "s=socket.socket(2,2)\nfor l,o in ((1,29),(1,35),(1,37),(1,63),(1,64),(1,65),(17,104)):\n"
        "    deny(lambda:s.setsockopt(l,o,1),'EPERM')",
    },
    "O34": {
        "title": "have the kernel run modprobe, as root", "mechanism": "seccomp: known kinds of sockets, ioctls of no bridge",
        "needs": ["seccomp"],
        "source": "inet_create, sock_ioctl: request_module for each socket and ioctl, whose CPU time is nobody's",
        "code": "for f in (2,10):\n    for t,p in ((1,17),(2,6),(2,200),(3,0),(3,255),(4,0),(5,0)):\n"
        "        deny(lambda:socket.socket(f,t,p),'EAFNOSUPPORT')\n"
        "import fcntl\ns=socket.socket(2,2)\n"
        "for o in (0x8940,0x8941,0x8980,0x8982,0x8983,0x89a0,0x89a1): deny(lambda:fcntl.ioctl(s,o,bytes(64)),'ENOTTY')",
    },
    "O35": {
        "title": "ioctls of file systems and namespaces", "mechanism": "seccomp: those of terminals, sockets and FICLONE only",
        "needs": ["seccomp"], "source": "BTRFS_IOC_SYNC is syncfs (O21), and asks nobody for a right; ioctl_ns(2)",
        "code": "import fcntl\nfd=os.open('/usr',0); n=os.open('/proc/self/ns/pid',0)\n"
        "for f,o in ((fd,0x9408),(fd,0x80089418),(fd,0x80086601),(fd,0x80111500),(n,0xb703)):\n"
        "    deny(lambda:fcntl.ioctl(f,o,bytearray(64)),'ENOTTY')",
    },
}  # fmt: skip
