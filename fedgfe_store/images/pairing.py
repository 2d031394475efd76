"""Which records are of the same sample, whatever place it had in each round."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from fedgfe_store.records import RecordKey


def sample_numbers(keys: Sequence[RecordKey], file_ids: Sequence[str]) -> list[int]:
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

    Returns
    -------
    list of int
        The number of each record: of two rounds' records, those of the same sample have the same.
    """
    known = {key: file_id for key, file_id in zip(keys, file_ids, strict=True) if file_id}
    if not known:
        return [key.index for key in keys]
    groups: dict[tuple[str, str, str], list[RecordKey]] = defaultdict(list)
    for key in dict.fromkeys(keys):
        groups[key.node, key.split, key.class_name].append(key)
    numbers: dict[RecordKey, int] = {}
    for group in groups.values():
        numbers |= _numbered(group, known)
    return [numbers[key] for key in keys]


def _numbered(group: list[RecordKey], known: dict[RecordKey, str]) -> dict[RecordKey, int]:
    """Give numbers to the records of one node, split and class."""
    ordered = sorted(group, key=lambda key: (key.round, key.index))
    fresh = max(key.index for key in group) + 1
    owner: dict[int, tuple[str, int]] = {}
    of_sample: dict[tuple[str, int], int] = {}
    seen: dict[tuple[int, str], int] = defaultdict(int)
    numbers: dict[RecordKey, int] = {}
    for key in ordered:
        if key not in known:
            continue
        place = key.round, known[key]
        sample = known[key], seen[place]
        seen[place] += 1
        if sample not in of_sample:
            number = key.index
            if number in owner:
                number, fresh = fresh, fresh + 1
            owner[number], of_sample[sample] = sample, number
        numbers[key] = of_sample[sample]
    taken = {(key.round, number) for key, number in numbers.items()}
    for key in ordered:
        if key not in known:
            number = key.index
            if (key.round, number) in taken:
                number, fresh = fresh, fresh + 1
            numbers[key] = number
    return numbers
