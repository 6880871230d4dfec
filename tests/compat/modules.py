"""Which of CPython's test modules ``scripts/compat`` runs. Those that look at the system come first."""

from __future__ import annotations

#: A quick one of each kind: continuous integration runs these.
SAMPLE = (
    "test_os", "test_posix", "test_tempfile", "test_shutil", "test_mmap", "test_fcntl", "test_pty", "test_select",
    "test_epoll", "test_ctypes", "test_asyncio.test_unix_events", "test_random",
)  # fmt: skip

MODULES = (
    *SAMPLE,
    "test_pathlib", "test_fileio", "test_glob", "test_largefile", "test_resource", "test_pwd", "test_grp", "test_json",
    "test_openpty", "test_ioctl", "test_signal", "test_subprocess", "test_popen", "test_fork1", "test_wait3", "test_wait4",
    "test_threading", "test_queue", "test_faulthandler", "test_eintr", "test_multiprocessing_main_handling",
    "test_selectors", "test_poll", "test_socket", "test_socketserver", "test_ssl", "test_httplib",
    "test_httpservers", "test_urllib", "test_urllib2_localnet", "test_xmlrpc", "test_ftplib", "test_smtplib", "test_poplib",
    "test_asyncio.test_subprocess", "test_asyncio.test_events", "test_logging", "test_hashlib", "test_hmac", "test_secrets",
    "test_uuid", "test_time", "test_datetime", "test_locale", "test_struct", "test_re", "test_zlib", "test_gzip", "test_zipfile",
    "test_bz2", "test_lzma", "test_tarfile", "test_pickle", "test_shelve", "test_dbm", "test_csv", "test_xml_etree",
    "test_email", "test_decimal", "test_math", "test_codecs", "test_inspect", "test_ast", "test_typing", "test_dataclasses",
    "test_enum", "test_collections", "test_functools", "test_contextlib", "test_weakref", "test_gc", "test_traceback",
    "test_tracemalloc", "test_zipimport", "test_runpy", "test_sysconfig", "test_platform", "test_coroutines",
)  # fmt: skip
