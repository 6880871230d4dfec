"""From the JSON text of a profile to checked rules, or to a flaw with its place. Pure: no host is looked at here."""

from __future__ import annotations

import errno
import json
import re
from typing import Any, NamedTuple

# Values of the kernel's SECCOMP_RET_*; ERRNO and TRACE carry 16 bits of data, and NOTIFY here the errno of the answer.
ALLOW, LOG, ERRNO, TRACE = 0x7FFF0000, 0x7FFC0000, 0x00050000, 0x7FF00000
KILL_PROCESS, KILL_THREAD, TRAP, NOTIFY = 0x80000000, 0x00000000, 0x00030000, 0x7FC00000
_ACTIONS = {
    "SCMP_ACT_ALLOW": ALLOW, "SCMP_ACT_LOG": LOG, "SCMP_ACT_ERRNO": ERRNO, "SCMP_ACT_TRACE": TRACE,
    "SCMP_ACT_KILL_PROCESS": KILL_PROCESS, "SCMP_ACT_KILL_THREAD": KILL_THREAD, "SCMP_ACT_KILL": KILL_THREAD,
    "SCMP_ACT_TRAP": TRAP, "SCMP_ACT_NOTIFY": NOTIFY,
}  # fmt: skip

#: Comparisons in libseccomp's own numbering, which starts at 1.
_OPS = {f"SCMP_CMP_{op}": i for i, op in enumerate(("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"), 1)}

_TOP = frozenset(
    ("defaultAction", "defaultErrnoRet", "defaultErrno", "architectures", "archMap", "flags", "syscalls", "comment")
)
_RULE = frozenset(
    ("names", "name", "action", "errnoRet", "errno", "args", "comment", "includes", "excludes", "optional")
)
_ARG = frozenset(("index", "value", "valueTwo", "op"))
_SELECTOR = frozenset(("caps", "arches", "minKernel"))
#: The names of the OCI runtime spec, and those by which Docker and Podman pick rules (Go's, and libseccomp's own).
_ARCHITECTURES = frozenset(f"SCMP_ARCH_{name}" for name in (
    "NATIVE", "X86", "X86_64", "X32", "ARM", "AARCH64", "MIPS", "MIPS64", "MIPS64N32", "MIPSEL", "MIPSEL64", "MIPSEL64N32",
    "PPC", "PPC64", "PPC64LE", "S390", "S390X", "PARISC", "PARISC64", "RISCV64", "LOONGARCH64", "M68K", "SH", "SHEB",
))  # fmt: skip
_FLAGS = frozenset(f"SECCOMP_FILTER_FLAG_{name}" for name in ("TSYNC", "LOG", "SPEC_ALLOW", "WAIT_KILLABLE_RECV"))
_ARCHES = frozenset((
    "amd64", "386", "x86", "x32", "arm", "arm64", "mips", "mipsle", "mipsel", "mips64", "mips64le", "mipsel64", "mips64n32",
    "mips64p32", "mips64p32le", "mipsel64n32", "ppc", "ppc64", "ppc64le", "s390", "s390x", "parisc", "parisc64", "riscv64",
    "loong64", "loongarch64", "m68k", "sh", "sheb",
))  # fmt: skip
_BETWEEN = re.compile(r"[\s,]*")
_KERNEL = re.compile(r"(\d{1,5})\.(\d{1,5})", re.ASCII)


class Flaw(Exception):
    """What is wrong, and where to look for it: the number of the rule (None: the top level), and a word in its text."""

    def __init__(self, message: str, token: str = "", rule: int | None = None, line: int | None = None) -> None:
        super().__init__(message)
        self.message, self.token, self.rule, self.line = message, token, rule, line

    def line_in(self, source: bytes) -> int | None:
        """The 1-based line of the flaw in the profile's text, None where it has no place."""
        if self.line is not None:
            return self.line
        text = source.decode(errors="replace")
        start, end = _span_of_rule(text, self.rule) if self.rule is not None else (0, len(text))
        found = text.find(f'"{self.token}"', start, end) if self.token else start
        return text.count("\n", 0, max(found, start)) + 1


class Condition(NamedTuple):
    """One comparison of a system call's argument, as libseccomp takes it."""

    argument: int
    op: int
    value: int
    value_two: int


class Selector(NamedTuple):
    """``includes`` or ``excludes`` of a rule: what kind of host it names."""

    caps: bool = False
    arches: tuple[str, ...] = ()
    min_kernel: tuple[int, int] | None = None


class Rule(NamedTuple):
    """One entry of ``syscalls``. ``number`` is its place in the list, ``action`` a SECCOMP_RET_* with its data."""

    number: int
    names: tuple[str, ...]
    action: int
    conditions: tuple[Condition, ...]
    includes: Selector
    excludes: Selector
    optional: bool

    def applies(self, arch: str, kernel: tuple[int, int]) -> bool:
        """Whether the rule counts on this host. A child holds no capability: one that asks for some never counts."""
        inc, exc = self.includes, self.excludes
        if inc.caps or (inc.arches and arch not in inc.arches) or arch in exc.arches:
            return False
        return (inc.min_kernel is None or kernel >= inc.min_kernel) and not (
            exc.min_kernel and kernel >= exc.min_kernel
        )


class Policy(NamedTuple):
    """A whole profile: the action for what no rule names, and the rules."""

    default: int
    rules: tuple[Rule, ...]

    @property
    def notifies(self) -> bool:
        """Whether somebody must listen."""
        return any(action & ~0xFFFF == NOTIFY for action in (self.default, *(rule.action for rule in self.rules)))


def parse_profile(source: bytes) -> Policy:
    """Checked rules of a profile's JSON text. Raises Flaw."""
    top = _fields(_decode(source), _TOP, "the profile", None)
    _known(top.get("architectures"), _ARCHITECTURES, "architectures", None)
    _known(top.get("flags"), _FLAGS, "flags", None)  # accepted: a child loads its filter when it has one thread
    for entry in _list(top.get("archMap"), "archMap", None):
        known = _fields(entry, frozenset(("architecture", "subArchitectures")), "archMap", None)
        _known([known.get("architecture")], _ARCHITECTURES, "archMap", None)
        _known(known.get("subArchitectures"), _ARCHITECTURES, "subArchitectures", None)
    default = _action(top, "defaultAction", "defaultErrnoRet", "defaultErrno", None)
    rules = tuple(_rule(entry, number) for number, entry in enumerate(_list(top.get("syscalls"), "syscalls", None)))
    return Policy(default, rules)


def _decode(source: bytes) -> Any:
    try:
        return json.loads(source.decode(), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise Flaw(f"not JSON: {error.msg} (column {error.colno})", line=error.lineno) from None
    except UnicodeDecodeError as error:
        raise Flaw("not JSON: not UTF-8 text", line=source.count(b"\n", 0, error.start) + 1) from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 100000 brackets
        raise Flaw(f"not JSON that can be read: {error}") from None


class _Doubled(dict[str, Any]):
    """An object with a field that is given twice: JSON's readers keep the last, and "syscalls" would be lost in silence."""

    field: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names, doubled = [name for name, _ in pairs], _Doubled(found)
    doubled.field = next(name for name in names if names.count(name) > 1)
    return doubled


def _rule(entry: Any, number: int) -> Rule:
    rule = _fields(entry, _RULE, "a rule", number)
    names = rule.get("names") if "name" not in rule else [rule["name"]]
    if ("name" in rule and rule.get("names")) or not names:
        raise Flaw("a rule needs 'names' with at least one system call (or the old 'name', not both)", "", number)
    optional = rule.get("optional", False)
    if not isinstance(optional, bool):
        raise Flaw(f"'optional' must be true or false, not {optional!r}", "optional", number)
    return Rule(
        number,
        _strings(names, "names", number),
        _action(rule, "action", "errnoRet", "errno", number),
        tuple(_condition(arg, number) for arg in _list(rule.get("args"), "args", number)),
        _selector(rule, "includes", number),
        _selector(rule, "excludes", number),
        optional,
    )


def _action(entry: dict[str, Any], key: str, number_key: str, name_key: str, rule: int | None) -> int:
    """The SECCOMP_RET_* of an action with its errno: Docker gives a number, Podman also a name, which then counts."""
    name = entry.get(key)
    if not isinstance(name, str) or name not in _ACTIONS:
        raise Flaw(f"'{key}': {name!r} is no action; known: {', '.join(_ACTIONS)}", key, rule)
    number = entry.get(number_key)
    number = errno.EPERM if number is None else _integer(number, number_key, 4095, rule)
    symbol = entry.get(name_key)
    if symbol:
        number = vars(errno).get(symbol) if isinstance(symbol, str) and symbol.isupper() else None
        if number is None:
            raise Flaw(f"'{name_key}': {symbol!r} is no errno's name", name_key, rule)
    action = _ACTIONS[name]
    return action | int(number) if action in (ERRNO, TRACE, NOTIFY) else action


def _condition(entry: Any, rule: int) -> Condition:
    arg = _fields(entry, _ARG, "an argument", rule)
    op = arg.get("op")
    if not isinstance(op, str) or op not in _OPS:
        raise Flaw(f"'op': {op!r} is no comparison; known: {', '.join(_OPS)}", "op", rule)
    index = _integer(arg.get("index"), "index", 5, rule)
    value = _integer(arg.get("value"), "value", (1 << 64) - 1, rule)
    value_two = _integer(arg.get("valueTwo", 0), "valueTwo", (1 << 64) - 1, rule)
    if op == "SCMP_CMP_MASKED_EQ" and value_two & ~value:
        raise Flaw(f"'valueTwo': {value_two} has bits outside the mask {value}; this can never match", "valueTwo", rule)
    return Condition(index, _OPS[op], value, value_two)


def _selector(rule: dict[str, Any], key: str, number: int) -> Selector:
    entry = _fields(rule.get(key) or {}, _SELECTOR, key, number)
    kernel = entry.get("minKernel")
    version = None
    if kernel:
        match = _KERNEL.fullmatch(kernel) if isinstance(kernel, str) else None
        if match is None:
            raise Flaw(f"'minKernel': {kernel!r} is no kernel version such as \"4.8\"", "minKernel", number)
        version = (int(match[1]), int(match[2]))
    caps = _strings(entry.get("caps") or [], "caps", number)
    return Selector(bool(caps), _known(entry.get("arches"), _ARCHES, "arches", number), version)


def _fields(value: Any, known: frozenset[str], what: str, rule: int | None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Flaw(f"{what} must be an object, not {_kind(value)}", "", rule)
    if isinstance(value, _Doubled):
        raise Flaw(f"{what} gives {value.field!r} twice", value.field, rule)
    for key in value:
        if key not in known:
            raise Flaw(f"{what} has no field {key!r}; known: {', '.join(sorted(known))}", key, rule)
    return value


def _list(value: Any, key: str, rule: int | None) -> list[Any]:
    if value is None:
        return []  # older profiles write "args": null
    if not isinstance(value, list):
        raise Flaw(f"'{key}' must be a list, not {_kind(value)}", key, rule)
    if key == "args" and len(value) > 6:
        raise Flaw(f"'args' has {len(value)} entries; a system call has at most six arguments", key, rule)
    return value


def _strings(value: Any, key: str, rule: int | None) -> tuple[str, ...]:
    items = _list(value, key, rule)
    if not all(isinstance(item, str) and item and item.isprintable() for item in items):
        raise Flaw(f"'{key}' must hold non-empty strings only, of characters that can be shown", key, rule)
    return tuple(items)


def _known(value: Any, known: frozenset[str], key: str, rule: int | None) -> tuple[str, ...]:
    """Names out of a list: one with a slip in it would leave out a rule, or hold a flag that nobody sets, in silence."""
    names = _strings(value, key, rule)
    for name in names:
        if name not in known:
            raise Flaw(f"'{key}': {name!r} is not known; known: {', '.join(sorted(known))}", name, rule)
    return names


def _integer(value: Any, key: str, high: int, rule: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
        raise Flaw(f"'{key}': {value!r} is not a whole number from 0 to {high}", key, rule)
    return value


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _span_of_rule(text: str, number: int) -> tuple[int, int]:
    """Where rule ``number`` lies in a text that is known to be JSON: step over the values of the list before it. The name of
    the list may stand in the text elsewhere, too: the last place counts, as for a JSON reader, at which such a list begins.
    """
    at = len(text)
    while (at := text.rfind('"syscalls"', 0, at)) >= 0:
        try:
            return _span_in_list(text, text.index("[", at) + 1, number)
        except ValueError:
            continue
    return 0, len(text)


def _span_in_list(text: str, start: int, number: int) -> tuple[int, int]:
    """Raises ValueError where no such list begins at ``start``."""
    decoder, end = json.JSONDecoder(), start
    for _ in range(number + 1):
        start = _BETWEEN.match(text, end).end()  # type: ignore[union-attr]  # it matches the empty string too
        end = decoder.raw_decode(text, start)[1]
    return start, end
