"""Histories as integers: what is packed is what was shown, and what ranks saw joins."""

import torch
from helpers import references
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from drophot.tracking import packed_history

shown = st.lists(st.booleans(), max_size=12)


def packed(outcomes: list[bool], history: Tensor | None = None) -> Tensor:
    """The history of one sample, as a batch in which it stands again and again."""
    history = torch.zeros(1, dtype=torch.int64) if history is None else history
    place, correct = torch.zeros(len(outcomes), dtype=torch.int64), torch.tensor(outcomes).bool()
    again = place[1:] == place[:-1]
    packed_history.present(history, place, correct, again, packed_history.steps(history.device))
    return history


def unpacked(history: Tensor) -> tuple[int, bool, int]:
    return (
        int(packed_history.events(history)),
        bool(packed_history.learned(history)),
        int(packed_history.presentations(history)),
    )


@given(shown)
def test_a_history_holds_what_the_definition_counts(outcomes: list[bool]) -> None:
    events, learned, presented = references.forgetting(1, ((0, right) for right in outcomes))
    assert unpacked(packed(outcomes)) == (events[0], learned[0], presented[0])


def settled(history: Tensor) -> Tensor:
    return history & ~(packed_history.SEEN | packed_history.FIRST)


@given(shown, shown)
def test_a_history_goes_on_from_where_it_was(first: list[bool], second: list[bool]) -> None:
    whole = packed(first + second)
    assert torch.equal(settled(packed(second, settled(packed(first)))), settled(whole))


@given(shown, st.lists(shown.filter(len), min_size=1, max_size=4))
def test_what_ranks_saw_joins_to_what_one_process_saw(
    past: list[bool], ranks: list[list[bool]]
) -> None:
    """To the bit, so that it does not matter what is joined or presented afterwards."""
    base = settled(packed(past))
    joined = base
    for outcomes in ranks:
        joined = packed_history.join(joined, base, packed(outcomes, base.clone()))
    everything = past + [right for outcomes in ranks for right in outcomes]
    assert torch.equal(settled(joined), settled(packed(everything)))


@given(shown.filter(len))
def test_the_bits_tell_how_a_sample_stands(outcomes: list[bool]) -> None:
    history = packed(outcomes)
    assert bool(history & packed_history.SEEN)
    assert bool(history & packed_history.FIRST) == outcomes[0]
    assert bool(history & packed_history.LAST) == outcomes[-1]


def test_the_counters_hold_the_most_presentations_and_then_turn_negative() -> None:
    most = packed_history.MAX_PRESENTATIONS
    history = packed([True] * most)
    assert unpacked(history) == (0, True, most)
    assert unpacked(packed([True, False] * (most // 2) + [True])) == (most // 2, True, most)
    assert history > 0
    nothing = torch.zeros(1, dtype=torch.int64)
    assert packed_history.join(history, nothing, packed([True])) < 0
    assert packed([False] * (most + 1)) < 0
