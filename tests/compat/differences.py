"""Tests of CPython's own that end otherwise in a child, each with the reason: what a program must do without in there."""

from __future__ import annotations

TERMINALS = "no terminals: /dev/ptmx and /dev/pts are not there (line disciplines are a row of kernel holes)"
NETLINK = "no netlink sockets, so no list of network interfaces (kernel holes; the network namespace has only lo)"
PIPE_SIZE = "pipes keep their size: F_SETPIPE_SZ would use up kernel memory of the host's"
SETGID = "no file may be setuid or setgid: a way out for whoever runs it outside"
ONE_ID = "one user id is mapped: to change to another is EINVAL (no such id), not EPERM"
URGENT = "no urgent data (MSG_OOB): on UNIX sockets it was a way out of a sandbox (CVE-2025-38236)"
NO_CARD = "the network namespace has no card, only lo: no hardware address to be found"
READ_ONLY = "the libraries are on a read-only file system: to remove what is not there is EROFS, not ENOENT"
SCRATCH = "wants 6 GB of disk; /tmp is bounded by Limits.scratch"
ETC = "Debian's sitecustomize.py is a link into /etc, and /etc is a made-up one"
STACK = "wants to be called from more than ten frames; a call in a child is, a bare script is not"

#: module -> (test, or the beginning of its name up to a dot) -> reason
KNOWN: dict[str, dict[str, str]] = {
    "test_ast": {"ASTValidatorTests.test_stdlib_validates": ETC},
    "test_asyncio.test_events": {
        f"{loop}EventLoopTests.{test}": TERMINALS
        for loop in ("EPoll", "Poll", "Select")
        for test in ("test_bidirectional_pty", "test_read_pty_output", "test_write_pty")
    },
    "test_fcntl": {"TestFcntl.test_fcntl_f_pipesize": PIPE_SIZE},
    "test_ftplib": {"TestFTPClass.test_abort": URGENT},
    "test_largefile": {"TestCopyfile.test_it": SCRATCH, "TestSocketSendfile.test_it": SCRATCH},
    "test_openpty": {"OpenptyTest.test": TERMINALS},
    "test_os": {
        "ChownFileTests.test_chown_without_permission": ONE_ID,
        "FDInheritanceTests.test_openpty": TERMINALS,
        "MakedirTests.test_exist_ok_s_isgid_directory": SETGID,
    },
    "test_pickle": {
        f"{kind}.test_unpickle_module_race": READ_ONLY
        for kind in ("CUnpicklerTests", "InMemoryPickleTests", "PyUnpicklerTests")
    },
    "test_pty": {"PtyTest.": TERMINALS},
    "test_runpy": {"RunModuleTestCase.": READ_ONLY},
    "test_socket": {
        "GeneralModuleTests.testInterfaceNameIndex": NETLINK,
        "GeneralModuleTests.test_getaddrinfo_ipv6_scopeid_symbolic": NETLINK,
        "GeneralModuleTests.test_getnameinfo_ipv6_scopeid_symbolic": NETLINK,
    },
    "test_subprocess": {
        "POSIXProcessTestCase.test_group": ONE_ID,
        "POSIXProcessTestCase.test_user": ONE_ID,
        "ProcessTestCase.test_pipesizes": PIPE_SIZE,
        "ProcessTestCaseNoPoll.test_pipesizes": PIPE_SIZE,
    },
    "test_tracemalloc": {"TestTracemallocEnabled.test_snapshot": STACK},
    "test_uuid": {
        f"TestInternals{kind}ExtModule.test_{tool}_getnode": NO_CARD
        for kind in ("With", "Without")
        for tool in ("ifconfig", "ip")
    },
}
