"""Tests of stores by their public API, to be run on stores of the other sort."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import pytest
from conftest import SMALL
from places import TESTS

from fedgfe_store import EmbeddingStore

# pytest finds the modules of a folder when it collects that folder.
sys.path += [str(TESTS / room) for room in ("checkpoints", "recording")]

# Of the local format alone: its lock, its files' names, backups, what a killed maker left.
LOCAL = {
    "test_error_tree_is_pinned",
    "test_create_takes_over_what_a_killed_create_left",
    "test_create_does_not_take_over_data",
    "test_a_busy_store_says_so",
    "test_two_names_of_one_store_share_one_lock",
    "test_compact_after_a_kill_between_commit_and_unlink",
    "test_verify_reports_what_is_no_record",
    "test_verify_goes_on_over_damaged_key_columns",
    "test_key_columns_are_picked_in_any_order",
    "test_under_warn_training_goes_on_and_the_round_is_listed",
    "test_a_busy_store",
    "test_an_error_in_the_middle_of_a_block_larger_than_the_buffer",
    "test_training_goes_on_while_another_writer_holds_the_store",
    "test_it_waits_when_the_buffer_is_full",
    "test_commands_show_it",
    "test_nothing_is_read_before_it_is_asked_for",
    "test_optional_audio",
    "test_scattered_selection_of_a_large_store_stays_small",  # libraries are imported meanwhile
}
ONE_OF_EACH_KIND = {
    "test_notes_come_back",
    "test_append_twice_changes_nothing",
    "test_replace_and_skip",
    "test_an_error_after_data_was_written_rolls_back",
    "test_as_of_shows_the_past_and_cannot_be_written",
    "test_delete_is_one_commit_and_the_past_stays",
    "test_history_says_what_each_commit_did",
    "test_compact_gathers_small_commits_bit_for_bit",
    "test_a_reader_of_an_older_commit_is_told_to_refresh",
    "test_verify_names_the_damaged_and_repair_lets_them_come_back",
    "test_merge_brings_sites_together",
    "test_a_pickled_store_and_selection_read_the_same",
}
"""Tests that the quick suite runs on shared stores, too."""


def borrowed(modules: list[ModuleType], *, quick: bool) -> dict[str, Any]:
    """Return fixtures and tests of other modules: one of each kind, or all the others."""
    found: dict[str, Any] = {}
    for module in modules:
        for name, value in vars(module).items():
            if name.startswith("test_") and callable(value):
                if name not in LOCAL and (name in ONE_OF_EACH_KIND) == quick:
                    found[name] = value
            elif type(value).__name__ == "FixtureFunctionDefinition":
                found[name] = value
    return found


@pytest.fixture(scope="module", autouse=True)
def every_store_is_shared() -> Iterator[None]:
    """Let whatever makes a store make a shared one."""
    create = EmbeddingStore.create
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmbeddingStore, "create", partial(create, shared=True))
        yield


@pytest.fixture
def store(tmp_path: Any) -> EmbeddingStore:
    """Return an empty shared store of small tensors."""
    return EmbeddingStore.create(tmp_path / "store.zarr", SMALL)
