"""The child's side of pisupervisor: standard library only, auditable in one sitting.

What runs before the walls are up lives here; what runs beside hostile code lives in ``pihost.inside``. Code in a child
finds ``pihost.call_host`` and ``pihost.call_host_raw`` here, and the errors that these raise.
"""


def __getattr__(name: str) -> object:
    if name in ("call_host", "call_host_raw", "HostError", "UnknownCallback"):
        from pihost.inside import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module 'pihost' has no attribute {name!r}")
