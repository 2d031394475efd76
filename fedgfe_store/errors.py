"""Errors, grouped by what a caller would do about them."""


class FedgfeStoreError(Exception):
    """Base of every error that fedgfe-store raises on purpose."""


class NotFoundError(FedgfeStoreError, FileNotFoundError):
    """A store, commit, checkpoint or model that is not there: correct the name."""


class SchemaMismatchError(FedgfeStoreError, ValueError):
    """Data or an option that does not fit: the message gives name, expected and got."""


class ConflictError(FedgfeStoreError, FileExistsError):
    """Something else is already there, or came in between: decide which one counts."""


class DamagedDataError(FedgfeStoreError, OSError):
    """Stored bytes that are not what was committed: restore or import them again."""


class BusyError(FedgfeStoreError, TimeoutError):
    """Another writer holds the store: wait, or give a longer timeout."""
