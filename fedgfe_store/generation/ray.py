"""A run on a Ray cluster: workers that keep a model take parts of the plan as they are free."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedgfe_store.common.extra import extra
from fedgfe_store.derived.record import Derived
from fedgfe_store.generation import prepare as preparing
from fedgfe_store.generation import run as here
from fedgfe_store.generation.crew import Foreman, Rendered, Worker, prepared
from fedgfe_store.generation.prepare import Report, Run, log_remark
from fedgfe_store.generation.request import DEFAULTS, Request
from fedgfe_store.generation.run import GenerationReport
from fedgfe_store.generation.stopping import SIGNALS, Stop
from fedgfe_store.generation.write import Progress
from fedgfe_store.images.folder import file_stamp
from fedgfe_store.selection import Selection

# A worker reads ahead and writes behind within a part only, and one that is left with a part while
# the others have none keeps them waiting.
_PARTS_PER_WORKER, _BATCHES_PER_PART = 8, 8
_LOOKS_EVERY = 0.5


def prepare(
    selection: Selection | Derived,
    output_dir: str | Path,
    request: Request = DEFAULTS,
    *,
    keep_negative: bool = True,
    report: Report = log_remark,
) -> Run:
    """Settle everything about a run, on a machine of the cluster that has a GPU if this has none.

    Parameters and errors are those of `generation.prepare.prepare`.
    """
    options: dict[str, Any] = {"keep_negative": keep_negative}
    with connected() as ray:
        if not ray.cluster_resources().get("GPU") or _own_gpu():
            return preparing.prepare(selection, output_dir, request, report=report, **options)
        there = ray.remote(num_gpus=1, num_cpus=1)(prepared)
        sent = pickle.dumps((selection, output_dir, request, options))
        run, remarks, error = pickle.loads(ray.get(there.remote(os.getcwd(), sent)))
    for remark in remarks:
        report(remark)
    if error is not None:
        raise error
    assert isinstance(run, Run)
    return run


def render(
    run: Run,
    *,
    workers: int | None = None,
    stop: Stop | None = None,
    report: Report = log_remark,
    progress: Progress | None = None,
) -> GenerationReport:
    """Render what a run's plan has to do, by workers of a Ray cluster.

    All machines have to see the store and the images' folder under the same paths. The cluster is
    the one that this process is connected to, or that ``RAY_ADDRESS`` or a file of ``ray start``
    names; without one, this machine.

    Parameters
    ----------
    run : Run
        From `prepare`.
    workers : int, optional
        Processes, each with a GPU and a model of its own; by default as many as the cluster has
        GPUs, or machines where it has none.
    stop, report, progress
        As for `generate`; progress comes as parts are finished.

    Returns
    -------
    GenerationReport
        What became of each image. An image that a worker made before it died is in `elsewhere`;
        one over which workers die again and again has failed.

    Raises
    ------
    NotFoundError
        If Ray is not installed, or the model's weights or a folder are not there on a worker.
    ConflictError
        If the output folder cannot be made.
    """
    extra("ray.data", "a run on Ray", "ray")
    if not run.plan.todo:
        return here.render(run, report=report)
    if run.plan.counts["done"]:
        here.complete_manifest(run, report)
    stop = stop or Stop()
    with connected() as ray:
        tally = _Tally(run, report, progress or (lambda _: None))
        with _telling(ray, stop) as foreman:
            for done in _results(ray, run, Crew.of(ray, workers), foreman):
                tally.add(done)
    return tally.close(stop)


@dataclass(frozen=True)
class Crew:
    """Workers, and what each of them is given.

    Parameters
    ----------
    workers : int
        Processes.
    gpus, cpus : int
        Of each.
    neighbours : int
        Processes of them that share a machine, at most.
    """

    workers: int
    gpus: int
    cpus: int
    neighbours: int

    @classmethod
    def of(cls, ray: Any, workers: int | None) -> Crew:
        """Decide by the cluster as it is now; one that grows may be given more workers."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = [int(node.get("GPU", 0)) for node in nodes]
        # A cluster's GPUs are of use to a run that was prepared for the CPU only where Ray has been
        # told of GPUs that torch does not know.
        if sum(gpus):
            count = workers or sum(gpus)
            return cls(count, 1, 1, min(count, max(gpus)))
        count = workers or len(nodes)
        cpus = sum(int(node.get("CPU", 0)) for node in nodes)
        return cls(count, 0, max(1, cpus // count), -(-count // len(nodes)))


class _Tally:
    """What became of the images so far."""

    def __init__(self, run: Run, report: Report, progress: Progress) -> None:
        self._run, self._report, self._progress = run, report, progress
        self._parts: list[Rendered] = []
        self._said: set[str] = set()

    def add(self, part: Rendered) -> None:
        """Count a part.

        Raises
        ------
        Exception
            What ended it on its worker.
        """
        for remark in part.remarks:
            if remark not in self._said:
                self._said.add(remark)
                self._report(remark)
        if part.error is not None:
            raise part.error
        self._parts.append(part)
        settled = part.done + part.elsewhere + len(part.failed)
        if settled:
            self._progress(settled)

    def close(self, stop: Stop) -> GenerationReport:
        """Say what became of all images, of those too whose workers died."""
        plan, parts = self._run.plan, self._parts
        done, elsewhere = sum(p.done for p in parts), sum(p.elsewhere for p in parts)
        failed = tuple(failure for part in parts for failure in part.failed)
        if elsewhere:
            self._list_what_dead_workers_made()
        made = GenerationReport(
            plan,
            done=done,
            skipped=here.skipped(plan),
            elsewhere=elsewhere,
            failed=failed,
            stopped=stop.reason,
            seconds=max((p.ended for p in parts), default=0.0)
            - min((p.began for p in parts), default=0.0),
        )
        if not (made.stopped and made.left and not (done or elsewhere)):
            return made
        stuck = here.note_stop(plan.folder, self._run.request.part, stop, self._report)
        return replace(made, stuck=stuck)

    def _list_what_dead_workers_made(self) -> None:
        plan = self._run.plan
        made = (item for item in plan.todo if file_stamp(item.path) not in (None, item.seen))
        items = tuple(replace(item, status="done") for item in made)
        here.complete_manifest(replace(self._run, plan=plan.with_items(items)), self._report)


def _results(ray: Any, run: Run, crew: Crew, foreman: Any) -> Iterator[Rendered]:
    """Yield what becomes of each part, in the order in which they are finished."""
    todo = run.plan.todo
    request = replace(run.request, limit=None)
    plan = replace(run.plan.with_items(todo), request=request)
    small = replace(run, plan=plan, request=request)
    # Apart from the constructor's arguments, which Ray sends with each worker that it makes.
    sent = {"run": ray.put(pickle.dumps(small)), "foreman": foreman, "workers": crew.workers}
    with _quiet(ray):
        rows = [{"start": start, "stop": stop} for start, stop in _parts(len(todo), run, crew)]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Worker,
            batch_size=1,
            fn_constructor_args=(os.getcwd(), crew.neighbours, sent),
            # One at a time: a part that waits for a busy worker is kept from one that is free.
            compute=ray.data.ActorPoolStrategy(size=crew.workers, max_tasks_in_flight_per_actor=1),
            num_cpus=crew.cpus,
            num_gpus=crew.gpus,
        )
        for row in dataset.iter_rows():
            yield pickle.loads(row["rendered"])


def _parts(count: int, run: Run, crew: Crew) -> Iterator[tuple[int, int]]:
    """Cut the plan in whole batches, so many that workers that are done early find another part."""
    share = count // (crew.workers * _PARTS_PER_WORKER * run.batch_size)
    size = run.batch_size * min(max(1, share), _BATCHES_PER_PART)
    for start in range(0, count, size):
        yield start, min(start + size, count)


@contextmanager
def connected() -> Iterator[Any]:
    """Give Ray, connected: to a cluster that is there, else to this machine alone.

    A connection that was there before stays.
    """
    ray = extra("ray", "a run on Ray", "ray")
    if ray.is_initialized():
        yield ray
        return
    # A cluster of our own reports to nobody; one of others was asked by who started it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _own_signals():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handlers of signals, of which Ray takes SIGTERM's for itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _telling(ray: Any, stop: Stop) -> Iterator[Any]:
    """Hand a request to stop on to the workers while the block runs."""
    # Here, since any other machine may be taken away.
    node = ray.get_runtime_context().get_node_id()
    foreman = (
        ray.remote(Foreman).options(num_cpus=0, label_selector={"ray.io/node-id": node}).remote()
    )
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOKS_EVERY):
            if stop.reason is not None:
                foreman.stop.remote(stop.reason)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield foreman
    finally:
        over.set()
        watcher.join()


@contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Have Ray Data draw no bars of its own and keep what it logs for its own files."""
    context = ray.data.DataContext.get_current()
    wanted = {"enable_progress_bars": False, "print_on_execution_start": False}
    before = {name: getattr(context, name) for name in wanted}
    logger = logging.getLogger("ray.data")
    level = logger.level
    for name, value in wanted.items():
        setattr(context, name, value)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)


def _own_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
