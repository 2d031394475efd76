"""Which records are of the same sample, whatever place it had in each round."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from fedgfe_store.records import RecordKey

Entry = tuple[str, RecordKey]
"""A record, and where it is from."""


def sample_numbers(
    keys: Sequence[RecordKey], file_ids: Sequence[str], sources: Sequence[str] | None = None
) -> list[int]:
    """Give numbers to the samples of each node, split and class alike in all rounds.

    A training loader shuffles, so that one index is another sample in each round. A sample that
    has a `file_id` has the number that is its index in the first round that has it, or a larger
    one where another sample has that; one that comes twice in a round counts as two. A record
    without a `file_id` has its index as its number.

    Parameters
    ----------
    keys : sequence of RecordKey
        Records; one that is given twice has one number.
    file_ids : sequence of str
        What identifies the file that each was made from; empty where that is not known.
    sources : sequence of str, optional
        Where each is from, such as its folder: another one's record of the same key may be of
        another sample.

    Returns
    -------
    list of int
        The number of each record: of two rounds' records, those of the same sample have the same.
    """
    if not any(file_ids):
        return [key.index for key in keys]
    entries = list(zip(sources or [""] * len(keys), keys, strict=True))
    known = {entry: file_id for entry, file_id in zip(entries, file_ids, strict=True) if file_id}
    groups: dict[tuple[str, str, str], list[Entry]] = defaultdict(list)
    for source, key in dict.fromkeys(entries):
        groups[key.node, key.split, key.class_name].append((source, key))
    numbers: dict[Entry, int] = {}
    for group in groups.values():
        numbers |= _numbered(group, known)
    return [numbers[entry] for entry in entries]


def _numbered(group: list[Entry], known: Mapping[Entry, str]) -> dict[Entry, int]:
    """Give numbers to the records of one node, split and class."""
    ordered = sorted(group, key=lambda entry: (entry[1].round, entry[0], entry[1].index))
    fresh = max(key.index for _, key in group) + 1
    owner: dict[int, tuple[str, int]] = {}
    of_sample: dict[tuple[str, int], int] = {}
    seen: dict[tuple[str, int, str], int] = defaultdict(int)
    numbers: dict[Entry, int] = {}
    for entry in ordered:
        if entry not in known:
            continue
        source, key = entry
        place = source, key.round, known[entry]
        sample = known[entry], seen[place]
        seen[place] += 1
        if sample not in of_sample:
            number = key.index
            if number in owner:
                number, fresh = fresh, fresh + 1
            owner[number], of_sample[sample] = sample, number
        numbers[entry] = of_sample[sample]
    taken = {(source, key.round, number) for (source, key), number in numbers.items()}
    for entry in ordered:
        if entry not in known:
            source, key = entry
            number = key.index
            if (source, key.round, number) in taken:
                number, fresh = fresh, fresh + 1
            numbers[entry] = number
    return numbers
