"""What the states of a store that a process sees one after another have in common."""

from __future__ import annotations

import os
import uuid
from functools import cached_property

from fedgfe_store.common.location import Location
from fedgfe_store.storage.place import Place
from fedgfe_store.storage.shared.granules import Granules
from fedgfe_store.storage.shared.key_table import Columns
from fedgfe_store.storage.shared.log import Log, same_anywhere


class Session:
    """The table that is open, files of keys that were read, and numbers of shards to be used.

    Attributes
    ----------
    known : dict of str to Columns
        By path; what is in a file of that name never changes.
    """

    def __init__(self, location: Location, place: Place) -> None:
        self._location, self._place = location, place
        self.known: dict[str, Columns] = {}

    @cached_property
    def log(self) -> Log:
        """The table; opened when it is first asked for, which readers of a known state need not."""
        return Log(same_anywhere(self._location, self._place))

    @cached_property
    def _granules(self) -> tuple[int, Granules]:
        return os.getpid(), Granules(self._place, uuid.uuid4().hex)

    @property
    def granules(self) -> Granules:
        """Numbers of shards that this process may use."""
        process, granules = self._granules
        if process != os.getpid():  # the parent goes on using its own
            self.__dict__.pop("_granules")
            return self._granules[1]
        return granules
