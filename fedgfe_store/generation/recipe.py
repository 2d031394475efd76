"""Making an image again from what it says about itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from fedgfe_store.common.location import Address, Location, found_from
from fedgfe_store.derived.again import derive
from fedgfe_store.derived.record import Derived
from fedgfe_store.derived_keys import Key
from fedgfe_store.errors import (
    ConflictError,
    FedgfeStoreError,
    NotFoundError,
    SchemaMismatchError,
)
from fedgfe_store.generation.plan import AGAIN
from fedgfe_store.generation.prepare import Report, Run
from fedgfe_store.generation.settings import fingerprint, settings_json
from fedgfe_store.images.compare import difference, noise_rule
from fedgfe_store.images.elsewhere import elsewhere_of, partners_of
from fedgfe_store.images.identity import record_digests
from fedgfe_store.images.png import inspect_image
from fedgfe_store.names import read_key
from fedgfe_store.records import KEY_COLUMNS, RecordKey
from fedgfe_store.store import EmbeddingStore

if TYPE_CHECKING:
    from fedgfe_store.generation.request import Noise, Request
    from fedgfe_store.selection import Selection

AGAIN_FOLDER = "again"
"""Where an image that is made again goes unless told otherwise: a folder beside the first one."""

_AS_THEY_ARE = ("steps", "guidance", "height", "width", "seed", "dtype")
"""Settings that are asked for by the same name, and with the same values."""

_TEXT, _NUMBER, _MAYBE_TEXT = (str,), (int,), (str, type(None))
_NEEDED = {"fingerprint": _TEXT, "digests": (dict,), "commit": _NUMBER, "seed": _NUMBER}
_NEEDED_SETTINGS = {
    **dict.fromkeys(("model", "revision", "dtype"), _TEXT),
    **dict.fromkeys(("steps", "height", "width", "seed"), _NUMBER),
    **dict.fromkeys(("pool", "quantization", "negative"), _MAYBE_TEXT),
    "guidance": (int, float, type(None)),
}


@dataclass(frozen=True)
class Recipe:
    """Record, settings and place of an image, as its own metadata has them.

    Parameters
    ----------
    path : Path
        The image.
    key : RecordKey, MeanKey or WalkKey
        Its record, or what was derived from some.
    number : int
        Which image of the record.
    provenance : mapping
        All that it says.
    """

    path: Path
    key: Key
    number: int
    provenance: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an image's metadata.

        Raises
        ------
        NotFoundError
            If there is no such file.
        SchemaMismatchError
            If it is damaged, or not one of ours.
        """
        if not path.is_file():
            raise NotFoundError(f"{path}: expected a picture, got none")
        state, provenance = inspect_image(path)
        if provenance is None:
            reason = "a damaged file" if state == "damaged" else "one of another program"
            raise SchemaMismatchError(f"{path}: expected a picture of fedgfe-store, got {reason}")
        key, number = read_key(provenance.get("key")), provenance.get("image")
        unfit = _unfit(provenance, _NEEDED) + _unfit(provenance["settings"], _NEEDED_SETTINGS)
        if key is None or not isinstance(number, int) or number < 0 or unfit:
            missing = ", ".join(unfit) or "record"
            raise SchemaMismatchError(
                f"{path}: expected a picture that says how it was made, got one without {missing}"
            )
        return cls(path, key, number, provenance)

    @property
    def store(self) -> Location | None:
        """The store that it was made from, if that is still there."""
        named = self.provenance.get("store")
        if not isinstance(named, str) or not named:
            return None
        try:
            place = self._place(named)
        except SchemaMismatchError:
            return None
        return place if isinstance(place, Address) or (place / "zarr.json").is_file() else None

    def request(self, asked: Request) -> Request:
        """Give the request that makes it again; what an image does not depend on is as asked."""
        settings = self.provenance["settings"]
        return replace(
            asked,
            model=asked.model or self._model(),
            diffusion_type=self.provenance.get("diffusion_type"),
            noise=cast("Noise", noise_rule(settings)),
            family=asked.family or self._file("family", settings.get("family")),
            lora=asked.lora or self._loras(),
            column=tuple(map(str, elsewhere_of(settings))),
            pool=settings["pool"] or "last",
            quantize=settings["quantization"],
            only_image=self.number,
            on_stale="regenerate",
            **{name: settings[name] for name in _AS_THEY_ARE},
        )

    def _place(self, named: str) -> Location:
        """Return what it names: a path as seen from its folder; earlier ones name absolute ones."""
        return found_from(named, self.path.parent)

    def _model(self) -> str:
        """Give its model: a folder of this machine, else a name that any machine knows."""
        named = self.provenance.get("model_folder")
        settings: Mapping[str, Any] = self.provenance["settings"]
        return str(self._place(named) if isinstance(named, str) else settings["model"])

    def _file(self, name: str, needed: object) -> str | None:
        """Give the file that a part of its settings is from."""
        named = self.provenance.get(name)
        if not needed:
            return None
        if not isinstance(named, str):
            raise SchemaMismatchError(
                f"{self.path}: expected its {name} to be named, got {named!r}"
            )
        return str(self._place(named))

    def _loras(self) -> tuple[str, ...]:
        """Give its LoRA as they are asked for; that they are still the same, `check` sees."""
        loras = self.provenance.get("loras", [])
        try:
            return tuple(f"{self._place(lora['file'])}:{float(lora['scale'])}" for lora in loras)
        except (TypeError, KeyError, ValueError):
            raise SchemaMismatchError(
                f"{self.path}: expected files and scales as its loras, got {loras!r}"
            ) from None

    def find(
        self, stores: Sequence[Location], *, report: Report, as_of: int | None = None
    ) -> Selection | Derived:
        """Find the record in the first store that has what the image was made from.

        Parameters
        ----------
        stores : sequence of Path or Address
            Where to look, in this order.
        report : callable
            Hears of it when that is not the first one.
        as_of : int, optional
            See each store as this commit left it.

        Raises
        ------
        FedgfeStoreError
            If none has it: what each one has.
        """
        errors: list[FedgfeStoreError] = []
        for path in stores:
            try:
                found = self.select(EmbeddingStore.open(path, as_of=as_of), report=report)
            except FedgfeStoreError as error:
                errors.append(error)
                continue
            if errors:
                report(f"{errors[0]}: using {path} instead")
            return found
        if len(errors) == 1:
            raise errors[0]
        raise ConflictError(
            "\n".join([f"{self.path} cannot be made again from any store:", *map(str, errors)])
        )

    def select(self, store: EmbeddingStore, *, report: Report) -> Selection | Derived:
        """Find the record, as of the commit that it was made from if it has changed since.

        Raises
        ------
        NotFoundError
            If the store does not have it.
        ConflictError
            If its embedding has changed and the old one cannot be reached.
        """
        selection = self._record_of(store)
        if selection is not None and self._is_of(selection):
            return selection
        commit = self.provenance["commit"]
        if commit < store.commit:
            before = self._record_of(EmbeddingStore.open(store.location, as_of=commit))
            if before is not None and self._is_of(before):
                report(f"the record has changed since commit {commit}: using it as of then")
                return before
        if selection is None:
            raise NotFoundError(f"{store.location}: expected a record {self.key}, got none")
        raise ConflictError(
            f"{self.path}: expected the embedding that it was made from, got another one in "
            f"{store.location} for {self.key}"
        )

    def _record_of(self, store: EmbeddingStore) -> Selection | Derived | None:
        key = self.key
        if isinstance(key, RecordKey):
            named: dict[str, Any] = {name: key.value(name) for name in KEY_COLUMNS}
            found = store.select(**named)
            return found if len(found) else None
        try:
            return derive(store.select(), key)
        except NotFoundError:
            return None

    def _is_of(self, selection: Selection | Derived) -> bool:
        digests: dict[str, str] = self.provenance["digests"]
        partners = partners_of(selection, elsewhere_of(self.provenance["settings"]))
        return record_digests(selection, digests, partners)[0] == digests

    def with_its_noise(self, run: Run) -> Run:
        """Return a run with the image's own seed: its record's ``file_id`` may have changed."""
        facts = self.provenance
        own = {"seed": facts["seed"], "file_id": facts.get("file_id", "")}
        items = tuple(replace(item, **own) for item in run.plan.items)
        return replace(run, plan=run.plan.with_items(items))

    def check(self, run: Run) -> None:
        """Make sure that a run has the image's settings and takes no image's place unasked.

        Raises
        ------
        ConflictError
            What differs, such as the model's revision, or which image would be lost.
        """
        settings = run.plan.settings
        if fingerprint(settings) != self.provenance["fingerprint"]:
            changed = difference(self.provenance["settings"], settings_json(settings))
            raise ConflictError(f"{self.path} cannot be made again: {changed}")
        for item in run.plan.items:
            if item.status == "done":
                raise ConflictError(
                    f"{item.path} is there already: overwrite it (--overwrite), or give another "
                    "folder (--images)"
                )
            if item.status == "stale" and item.reason != AGAIN and item.path != self.path:
                raise ConflictError(
                    f"{item.path} is another picture ({item.reason}): give another folder "
                    "(--images)"
                )


def _unfit(facts: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> list[str]:
    """Name the facts that are missing, or of another type than their image would give them."""
    absent = object()
    return [name for name, kind in kinds.items() if not isinstance(facts.get(name, absent), kind)]
