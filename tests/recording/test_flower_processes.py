"""The example Flower app over processes: a SuperLink, three SuperNodes and `flwr run`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from places import ROOT
from processes import Process, started, until

pytest.importorskip("flwr", reason="Flower is not installed (the extra flower)")

from test_flower import run_example

from fedgfe_store import EmbeddingStore

pytestmark = [pytest.mark.long, pytest.mark.kill]

BIN = Path(sys.executable).parent
LOCAL = "127.0.0.1"


def free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind((LOCAL, 0))
        return [each.getsockname()[1] for each in sockets]


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection((LOCAL, port), 1):
        return True
    return False


class Federation:
    """A SuperLink and three SuperNodes."""

    def __init__(self, link: Process, environment: dict[str, str], folder: Path) -> None:
        self.link, self.environment, self.folder = link, environment, folder

    @contextmanager
    def run(self, rounds: int) -> Iterator[Process]:
        """Run the example's rounds; its output can be read while it runs."""
        config = f"folder='{self.folder / 'out'}' rounds={rounds}"
        app = ROOT / "examples" / "flower"
        command: list[str | Path] = [BIN / "flwr", "run", app, "--stream"]
        command += ["--run-config", config]
        with started(command, env=self.environment, stderr=subprocess.STDOUT) as process:
            yield process

    def servers(self) -> list[psutil.Process]:
        """The processes in which ServerApps run."""
        found = []
        for each in self.link.family():
            with suppress(psutil.NoSuchProcess):
                if any(word.endswith("flwr-serverapp") for word in each.cmdline()):
                    found.append(each)
        return found


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    port, *others = free_ports(4)
    home = tmp_path / "home"
    home.mkdir()
    connection = f'address = "{LOCAL}:{port}"\ninsecure = true\n'
    text = f'[superlink]\ndefault = "here"\n\n[superlink.here]\n{connection}'
    (home / "config.toml").write_text(text)
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }
    with ExitStack() as stack:

        def start(*words: str | Path) -> Process:
            log = stack.enter_context(open(tmp_path / f"{len(os.listdir(tmp_path))}.log", "w"))
            process = started(words, env=environment, stdout=log, stderr=log, cwd=tmp_path)
            return stack.enter_context(process)

        here = ("--insecure", "--host", LOCAL)
        link = start(
            BIN / "flower-superlink", *here, "--port", str(port),
            "--disable-runtime-dependency-installation",
        )  # fmt: skip
        until(lambda: answers(port))
        for number, other in enumerate(others):
            start(
                BIN / "flower-supernode", *here, "--port", str(other),
                "--superlink", f"{LOCAL}:{port}", "--node-config", f"partition-id={number}",
            )  # fmt: skip
        yield Federation(link, environment, tmp_path)


def line_with(process: Process, words: str) -> str:
    """Wait for a line of what it prints."""
    said = []
    while line := process.line():
        said.append(line)
        if words in line:
            return line
    raise AssertionError("\n".join(said))


def whole_rounds(folder: Path) -> list[int]:
    """Return the rounds in the store, of which each has to be whole."""
    records = EmbeddingStore.open(folder / "embeddings.zarr").select().records
    sizes = records.groupby(["round", "node"]).size().to_dict()
    rounds = sorted(set(records["round"].tolist()))
    each = {"0": 20, "1": 20, "2": 20, "server": 30}
    assert sizes == {(number, node): n for number in rounds for node, n in each.items()}
    return rounds


def test_a_server_that_is_killed_goes_on_and_every_round_is_whole(federation, tmp_path):
    out = tmp_path / "out"
    with federation.run(3) as first:
        line_with(first, "round 1: test loss")
        (server,) = federation.servers()
        line_with(first, "configure_train")  # the nodes are at work on round 2
        server.kill()
        until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
    assert whole_rounds(out) == [1]
    with federation.run(3) as second:
        line_with(second, "round 3: test loss")
        line_with(second, "Final results")
    assert whole_rounds(out) == [1, 2, 3]
    store = EmbeddingStore.open(out / "embeddings.zarr")
    assert store.commit == 3
    assert store.verify().sound
    # As it would have been undisturbed; sums of floats depend on who answered first.
    run_example(tmp_path / "undisturbed", 3)
    expected = EmbeddingStore.open(tmp_path / "undisturbed" / "embeddings.zarr").select()
    found = store.select()
    order = [sorted(range(len(each)), key=each.keys().__getitem__) for each in (found, expected)]
    for column in ("t5", "clip"):
        ours, theirs = found.read(column)[order[0]], expected.read(column)[order[1]]
        np.testing.assert_allclose(ours, theirs, rtol=0.05, atol=0.05)
