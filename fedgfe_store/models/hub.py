"""Models of the Hugging Face hub: what its cache on this machine has, and getting the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from fedgfe_store.errors import NotFoundError

# huggingface_hub waits 10 s by default, for each file: a machine without a network falls back to
# the cache sooner.
_HUB_TIMEOUT_SECONDS = 5


def find_on_hub(name: str, configs: Callable[[Path], Iterable[str]]) -> Path | None:
    """Return a hub model's folder in the cache, downloading its configurations if need be.

    Parameters
    ----------
    name : str
        Its id.
    configs : callable
        Says of a cached folder which files may not be missing if it is to do.

    Returns
    -------
    Path or None
        None if no model can have such a name.

    Raises
    ------
    NotFoundError
        If it is neither cached nor reachable: how to get it.
    """
    # huggingface_hub takes 0.2 s to import, which models in folders do without.
    from huggingface_hub.errors import HFValidationError

    if "/" not in name:
        return None
    try:
        return _cached_snapshot(name, configs) or download(name, ["*.json"])
    except HFValidationError:
        return None


def _cached_snapshot(name: str, configs: Callable[[Path], Iterable[str]]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "model_index.json")
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    return folder if all((folder / config).is_file() for config in configs(folder)) else None


def download(
    name: str,
    patterns: list[str],
    *,
    revision: str | None = None,
    ignored: list[str] | None = None,
) -> Path:
    """Download files of a hub's model into the cache.

    Without a network, what is cached counts as it is, whole or not.

    Parameters
    ----------
    name : str
        Its id.
    patterns, ignored : list of str
        Which files, and which of them not.
    revision : str, optional
        Commit; by default the newest.

    Raises
    ------
    NotFoundError
        If the model is neither cached nor reachable: how to get it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=ignored,
            etag_timeout=_HUB_TIMEOUT_SECONDS,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise NotFoundError(how_to_get(name, str(error).strip().splitlines()[0])) from error
    return Path(folder)


def how_to_get(name: str, reason: str) -> str:
    """Say where models are looked for, why one is not there, and what to do about it."""
    return (
        f"model {name}: expected a folder, or a model in the local cache or on the hub, got none "
        f"of them ({reason}).\n"
        f"Where there is a network: accept the licence on the model's page if it is gated, log in "
        f"with `hf auth login`, and run `hf download {name}` with HF_HOME set to a folder that "
        "this machine sees.\n"
        "`--model FOLDER` takes a local copy; `--model tiny` runs without any download."
    )
