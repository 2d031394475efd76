"""A Ceph of one machine, in memory, whose gateway is an S3 server: Debian's packages have it."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from processes import finished, started, until

CEPH_KEY, CEPH_SECRET = "test", "testing"
"""Credentials of the server's only user."""
_PROGRAMS = (
    "ceph",
    "ceph-authtool",
    "ceph-mon",
    "ceph-osd",
    "monmaptool",
    "radosgw-admin",
    "radosgw",
)

_KEYS = {"mon.": "mon", "client.admin": "mon osd mgr", "osd.0": "mon osd", "client.rgw": "mon osd"}

# One copy of everything, no manager, no check that the disk has room: a server for minutes.
_CONFIGURATION = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{monitor}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
keyring = {folder}/keyring
run dir = {folder}
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
log file = {folder}/$name.log
mon data = {folder}/mon
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 2147483648
osd class load list = *
osd class default list = *
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon data avail crit = 1
auth allow insecure global id reclaim = true
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{gateway}
rgw run sync thread = false
rgw enable usage log = false
"""


def has_ceph() -> bool:
    """Whether Ceph's programs are installed: `apt-get install ceph-mon ceph-osd radosgw`."""
    return all(shutil.which(program) for program in _PROGRAMS)


@contextmanager
def ceph_server(folder: Path, bucket: str) -> Iterator[str]:
    """Run Ceph in an empty folder, of a short path, while the block runs; yields the URL."""
    monitor, gateway = _free_port(), _free_port()
    fsid, url = uuid4(), f"http://127.0.0.1:{gateway}"
    config = folder / "ceph.conf"
    config.write_text(
        _CONFIGURATION.format(folder=folder, fsid=fsid, monitor=monitor, gateway=gateway)
    )
    for name in ("mon", "osd"):
        (folder / name).mkdir()
    environment = {**os.environ, "CEPH_CONF": str(config)}

    def call(*command: str, input: str | None = None) -> str:
        return finished(command, env=environment, input=input).stdout

    with ExitStack() as stack:

        def start(*command: str) -> None:
            log = stack.enter_context((folder / f"{command[0]}.out").open("w"))
            stack.enter_context(started(command, env=environment, stdout=log, stderr=log))

        keys = str(folder / "keyring")
        call("ceph-authtool", "--create-keyring", keys)
        for name, servers in _KEYS.items():
            rights = [word for server in servers.split() for word in ("--cap", server, "allow *")]
            call("ceph-authtool", keys, "--gen-key", "-n", name, *rights)
        address = f"[v2:127.0.0.1:{monitor}]"
        map_file = str(folder / "monmap")
        call("monmaptool", "--create", "--addv", "a", address, "--fsid", str(fsid), map_file)
        call("ceph-mon", "--mkfs", "-i", "a", "--monmap", map_file, "--keyring", keys)
        start("ceph-mon", "-f", "-i", "a")
        disk = str(uuid4())
        call("ceph", "osd", "new", disk, "0")
        call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        start("ceph-osd", "-f", "-i", "0")
        call("ceph", "osd", "crush", "add", "0", "1.0", "root=default", "host=localhost")
        start("radosgw", "-f", "-n", "client.rgw")
        until(lambda: _answers(gateway))
        call(
            *("radosgw-admin", "user", "create", "--uid", "tests", "--display-name", "tests"),
            *("--access-key", CEPH_KEY, "--secret-key", CEPH_SECRET),
        )
        _make_bucket(url, bucket)
        yield url


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _make_bucket(url: str, bucket: str) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=CEPH_KEY,
        aws_secret_access_key=CEPH_SECRET,
    )
    try:
        client.create_bucket(Bucket=bucket)
    finally:
        client.close()
