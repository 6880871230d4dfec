"""The launch plans: every field, each with its type, and nothing else."""

from __future__ import annotations

import marshal
from typing import Any

import pytest

from pihost.plan import ChildPlan, Plan, PlanError, TemplatePlan

TEMPLATE: dict[str, Any] = {
    "root": [["folder", "/tmp"]], "own_ids": [], "interpreter": "/usr/bin/python3", "package": "/pis/pihost",
    "sys_path": ["/pis"], "import_paths": [], "preload": [], "environment": {"PATH": "/bin"}, "seccomp": b"",
    "listen": False, "network": "none",
    "log_level": 30,
}  # fmt: skip
CHILD: dict[str, Any] = {
    "namespaces": 0, "uid_map": "1000 1879048192 1", "gid_map": "1000 1879048192 1", "uid": 1000, "gid": 1000,
    "hostname": "pihost", "mounts": [["proc", "/proc", ""]], "rlimits": [[7, 256, 256]], "nice": 0,
    "landlock": [["/", 13]], "landlock_abi": 6, "landlock_fs": 1, "landlock_net": 3, "landlock_scopes": 3, "output": 3,
    "cgroups": 2, "limits": {"result": 1, "pickle": 0, "modules": 0}, "debug": False, "without": [],
}  # fmt: skip
EXAMPLES = [(TemplatePlan, TEMPLATE), (ChildPlan, CHILD)]
FIELDS = [(kind, values, name) for kind, values in EXAMPLES for name in values]


@pytest.mark.parametrize(("kind", "values"), EXAMPLES)
def test_there_and_back(kind: type[Plan], values: dict[str, Any]) -> None:
    assert vars(kind.load(kind(**values).dump())) == values


@pytest.mark.parametrize(("kind", "values"), EXAMPLES)
def test_the_examples_name_every_field(kind: type[Plan], values: dict[str, Any]) -> None:
    assert values.keys() == kind.FIELDS.keys()
    assert all(name in (kind.__doc__ or "") for name in values), "a field without a word about it"


@pytest.mark.parametrize(("kind", "values", "name"), FIELDS)
def test_a_missing_field_is_named(kind: type[Plan], values: dict[str, Any], name: str) -> None:
    with pytest.raises(PlanError, match=rf"missing or unknown fields: {name}$"):
        kind(**{key: value for key, value in values.items() if key != name})


@pytest.mark.parametrize(("kind", "values"), EXAMPLES)
def test_an_unknown_field_is_named(kind: type[Plan], values: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="surprise"):
        kind(**values, surprise=1)


@pytest.mark.parametrize(("kind", "values", "name"), FIELDS)
def test_a_field_of_the_wrong_type_is_named(kind: type[Plan], values: dict[str, Any], name: str) -> None:
    with pytest.raises(PlanError, match=rf"\.{name}: "):
        kind(**{**values, name: 1.5})


@pytest.mark.parametrize("name", [name for _, values, name in FIELDS if isinstance(values[name], list)])
def test_a_list_of_the_wrong_things(name: str) -> None:
    kind, values = next((kind, values) for kind, values in EXAMPLES if name in values)
    with pytest.raises(PlanError, match=rf"\.{name}: "):
        kind(**{**values, name: [1.5]})


def test_what_is_no_mapping() -> None:
    with pytest.raises(PlanError, match="not a mapping"):
        ChildPlan.load(marshal.dumps([1, 2], 2))


def test_the_format_is_what_every_interpreter_reads() -> None:
    """Host and child may be of different Python versions: marshal's version 2 has not changed since 2.4."""
    assert ChildPlan(**CHILD).dump() == marshal.dumps(CHILD, 2)
