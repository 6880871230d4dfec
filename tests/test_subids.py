"""Subordinate ids: which there are (pure), and an ordinary user's children with ids of their own, by newuidmap."""

from __future__ import annotations

import json
import shlex
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import features
import pytest
from conftest import OrdinaryUser
from helpers import DEGRADE

from pisupervisor import FeatureUnavailable, OptionsError, Security
from pisupervisor.launch import subids


def test_the_largest_range_of_the_user_counts() -> None:
    text = "root:1:5\nme:100000:10\n1000:300000:65536\nyou:9:999999\nme:x:7\n\nme:5\n"
    assert subids.parse(text, ("1000", "me")) == (300000, 65536)
    assert subids.parse(text, ("1001", "")) == (0, 0)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("", 100000),
        ("you:100000:65536\n", 165536),
        ("you:165536:65536\nme:100000:65536\nyou:100000:65536\n", 231072),
        ("you:120000:10\n", 120010),
        ("you:231072:9\nroot:1879048192:1048576\nme:100000:65536", 165536),
    ],
)
def test_ids_that_are_advised_are_nobodys(text: str, first: int, tmp_path: Path) -> None:
    assert subids.free(text) == first
    for name in ("subuid", "subgid"):
        (tmp_path / name).write_text(text if name == "subuid" else "")
    with pytest.raises(FeatureUnavailable) as caught:
        subids.find(4242, str(tmp_path))
    assert f"--add-subgids {first}-{first + 65535} 4242" in str(caught.value.remedy)


def test_what_is_missing_is_said_with_the_way_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FeatureUnavailable) as caught:
        subids.find(4242, str(tmp_path))
    assert caught.value.feature == "user"
    assert "usermod --add-subuids 100000-165535 --add-subgids 100000-165535 4242" in str(caught.value.remedy)
    for name in ("subuid", "subgid"):
        (tmp_path / name).write_text(f"4242:100000:{subids.BLOCK - 1}\n")
    with pytest.raises(FeatureUnavailable, match="give uid 4242 255 ids"):
        subids.find(4242, str(tmp_path))


def test_it_is_a_switch() -> None:
    with pytest.raises(OptionsError, match="subordinate_ids: expected True or False"):
        Security(subordinate_ids="yes")  # type: ignore[arg-type]


SOURCE = f"""
    import json, os
    from pisupervisor import *
    D = {("memory", "swap", "cpus", "pids", *DEGRADE)!r}
    def outer(pid):
        with open(f"/proc/{{pid}}/status") as file:
            return {{line.split()[0]: line.split()[1:] for line in file if line[:3] in ("Uid", "Gid", "Gro")}}
    def attempt(memory=None, **security):
        limits = Limits(memory=memory, swap=None)
        try:
            with (ProcessIsolator.create(security=Security(**security), degrade=D, limits=limits) as one,
                  ProcessIsolator.create(security=Security(**security), degrade=D, limits=limits) as two):
                inside = one.run_source("import os; [os.getuid(), os.getgid(), 6 * 7]").value
                zygote = one._keeper.template.zygote
                zygote_before = outer(zygote.pid)["Uid:"][0]
                one.restart()
                return {{"inside": inside, "outside": [outer(one.pid), outer(two.pid)], "detail": two.applied["user"].detail,
                        "zygote": zygote_before, "closure": two.invoke(lambda: 7)}}
        except (FeatureUnavailable, LaunchError) as error:
            return {{"kind": type(error).__name__, "remedy": error.remedy, "text": str(error)}}
"""


def tell(user: OrdinaryUser, ranges: str, *security: str) -> list[Any]:
    """What ``attempt`` comes to with each of these settings, where /etc/subuid and /etc/subgid have that text."""
    for name in ("subuid", "subgid"):
        (user.home / name).write_text(ranges)
    over = " && ".join(f"mount --bind {user.home}/{name} /etc/{name}" for name in ("subuid", "subgid"))
    source = textwrap.dedent(SOURCE) + f"print(json.dumps([{', '.join(f'attempt({one})' for one in security)}]))"
    words = ["setpriv", "--reuid", "1000", "--regid", "1000", "--groups", "1000,4444", user.python, "-c", source]
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", f"{over} && exec {shlex.join(words)}"],
        cwd=user.home, env=user.environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.rootless
def test_children_have_ids_of_their_own(ordinary_user: OrdinaryUser) -> None:
    """The control is the same without them: the user's one id for all."""
    features.need("newuidmap")
    distinct, single = tell(ordinary_user, "1000:500000:65536\n", "subordinate_ids=True", "")
    assert distinct["inside"] == single["inside"] == [1000, 1000, 42]
    uids = [{*child["Uid:"], *child["Gid:"]} for child in distinct["outside"]]
    assert all(len(ids) == 1 and 500000 <= int(*ids) < 565536 for ids in uids), uids
    assert uids[0] != uids[1]
    assert [child["Groups:"] for child in distinct["outside"]] == [[], []], "none of the user's"
    assert distinct["detail"].endswith(f"; outside it is uid {distinct['outside'][1]['Uid:'][0]}")
    assert distinct["zygote"] == "1000"
    assert distinct["closure"] == 7
    assert [child["Uid:"] for child in single["outside"]] == [["1000"] * 4] * 2
    assert single["detail"].endswith("; outside it is uid 1000")


@pytest.mark.rootless
def test_without_a_range_it_is_an_error_with_the_command(ordinary_user: OrdinaryUser) -> None:
    features.need("newuidmap")
    (refused,) = tell(ordinary_user, "root:1:2\n", "subordinate_ids=True")
    assert refused["kind"] == "FeatureUnavailable"
    assert "usermod --add-subuids" in refused["remedy"]


@pytest.mark.rootless
def test_a_watched_memory_limit_needs_the_single_id(ordinary_user: OrdinaryUser) -> None:
    """Of other ids' processes the watch could not see all that they hold."""
    features.need("newuidmap")
    refused, kept = tell(ordinary_user, "1000:500000:65536\n", "memory='64M', subordinate_ids=True", "memory='64M'")
    assert refused["kind"] == "FeatureUnavailable"
    assert "leave subordinate_ids out" in refused["remedy"]
    assert kept["inside"][2] == 42


@pytest.mark.rootless
def test_a_range_that_newuidmap_refuses(ordinary_user: OrdinaryUser) -> None:
    """One that begins with root itself: the tool's own words come through."""
    features.need("newuidmap")
    (refused,) = tell(ordinary_user, "1000:0:65536\n", "subordinate_ids=True")
    assert refused["kind"] == "LaunchError"
    assert "newuidmap: " in refused["text"]
    assert "leave subordinate_ids out" in refused["remedy"]
