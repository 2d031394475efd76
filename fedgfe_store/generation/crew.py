"""What runs on the workers of a Ray cluster: planning, and rendering with a model that is kept."""

from __future__ import annotations

import os
import pickle
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedgfe_store.errors import FedgfeStoreError, NotFoundError
from fedgfe_store.generation import run as here
from fedgfe_store.generation.prepare import Run, prepare
from fedgfe_store.generation.stopping import Stop
from fedgfe_store.generation.write import Failure
from fedgfe_store.images.folder import file_stamp
from fedgfe_store.images.manifest import machine_manifest
from fedgfe_store.models.devices import choose_device

_LOOKS_EVERY = 0.5
# Of a part, by workers that die over it: their machine may have been taken away, but an image may
# also kill whoever tries it, and Ray would try for ever.
_TRIES = 4
_LOADING = "loading"


@dataclass(frozen=True)
class Rendered:
    """What became of a part of the plan on a worker."""

    start: int
    stop: int
    done: int = 0
    elsewhere: int = 0
    failed: tuple[Failure, ...] = ()
    remarks: tuple[str, ...] = ()
    began: float = 0.0
    ended: float = 0.0
    error: Exception | None = None


class Worker:
    """Keeps a loaded model and renders parts of a plan, with all that `render` promises of each."""

    def __init__(self, cwd: str, neighbours: int, sent: Mapping[str, Any]) -> None:
        self._remarks: list[str] = []
        self._stop, self._error = Stop(), None
        # Ray would try to make a worker that cannot be made for ever: the first part says why.
        try:
            self._begin(cwd, neighbours, sent)
        except Exception as error:  # noqa: BLE001 - raised by the driver
            self._error = _sendable(error)

    def _begin(self, cwd: str, neighbours: int, sent: Mapping[str, Any]) -> None:
        import ray

        _go_to(cwd)
        # As torchrun says it: who pins the host's memory takes its share.
        os.environ["LOCAL_WORLD_SIZE"] = str(neighbours)
        self._foreman = sent["foreman"]
        # Ray starts a worker anew that was killed while it loaded, as where memory is short: more
        # cannot be loading than there are, so those beyond have died.
        if ray.get(self._foreman.begin.remote(_LOADING)) > sent["workers"] + _TRIES:
            raise FedgfeStoreError(
                f"workers died {_TRIES} times while they loaded the model; memory of their machine "
                "may be short, and Ray's logs may say why"
            )
        run = pickle.loads(ray.get(sent["run"]))
        if run.placement.device.startswith("cuda"):
            # Ray shows a worker its own GPU only, whatever its number was where it was prepared.
            placement = replace(run.placement, device=choose_device("cuda"))
            run = replace(run, placement=placement)
        self._run, self._pipeline = here.load_model(run, self._remarks.append)
        self._foreman.finish.remote(_LOADING)
        # Lines of one machine do not mix in one file; those of several do on network disks.
        self._manifest = machine_manifest(ray.util.get_node_ip_address())
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        import ray

        while not self._stop.requested:
            reason = ray.get(self._foreman.reason.remote())
            if reason:
                self._stop.request(reason)
            time.sleep(_LOOKS_EVERY)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[bytes]]:
        """Render the images from ``start`` up to ``stop`` of the plan; give a `Rendered`."""
        start, stop = int(batch["start"][0]), int(batch["stop"][0])
        began = time.time()
        try:
            done = self._rendered(start, stop)
        except Exception as error:  # noqa: BLE001 - raised by the driver
            done = Rendered(start, stop, error=_sendable(error))
        remarks, self._remarks[:] = tuple(self._remarks), []
        done = replace(done, remarks=remarks, began=began, ended=time.time())
        return {"rendered": [pickle.dumps(done)]}

    def _rendered(self, start: int, stop: int) -> Rendered:
        import ray

        if self._error is not None:
            raise self._error
        if self._stop.requested:
            return Rendered(start, stop)
        items = self._run.plan.items[start:stop]
        if ray.get(self._foreman.begin.remote(start)) > _TRIES:
            left = [item for item in items if file_stamp(item.path) == item.seen]
            reason = f"its worker died {_TRIES} times over this part; Ray's logs may say why"
            failed = tuple(Failure(item.key, item.number, reason) for item in left)
            return Rendered(start, stop, elsewhere=len(items) - len(left), failed=failed)
        plan = self._run.plan.with_items(items)
        made = here.render(
            replace(self._run, plan=plan),
            pipeline=self._pipeline,
            stop=self._stop,
            report=self._remarks.append,
            manifest=self._manifest,
        )
        return Rendered(start, stop, made.done, made.elsewhere, made.failed)


class Foreman:
    """Where workers learn that they are to stop, and whether others have died over a part."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._tries: Counter[int | str] = Counter()

    def stop(self, reason: str) -> None:
        """Ask for a stop."""
        self._reason = reason

    def reason(self) -> str | None:
        """Give why a stop was asked for; None where it was not."""
        return self._reason

    def begin(self, what: int | str) -> int:
        """Count a try of something, as of the part that begins there, and give the count."""
        self._tries[what] += 1
        return self._tries[what]

    def finish(self, what: int | str) -> None:
        """Count from none again."""
        del self._tries[what]


def prepared(cwd: str, sent: bytes) -> bytes:
    """Call `prepare` with what was pickled; give its run, remarks and error, pickled."""
    remarks: list[str] = []
    run: Run | None = None
    failed: Exception | None = None
    try:
        _go_to(cwd)
        selection, output_dir, request, options = pickle.loads(sent)
        run = prepare(selection, output_dir, request, report=remarks.append, **options)
    except Exception as error:  # noqa: BLE001 - raised by the driver
        failed = _sendable(error)
    return pickle.dumps((run, remarks, failed))


def _go_to(cwd: str) -> None:
    """Have relative paths mean what they mean to the driver."""
    try:
        os.chdir(cwd)
    except OSError as error:
        raise NotFoundError(
            f"{cwd}: expected on all machines, since store and images lie on a disk that they "
            f"share, got on one of them: {error.strerror}"
        ) from None


def _sendable(error: Exception) -> Exception:
    """Give an error as the driver can raise it; a fault takes along where it came from."""
    if not isinstance(error, (FedgfeStoreError, OSError)):  # which say all that there is to say
        error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - of other libraries, which may raise anything
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
