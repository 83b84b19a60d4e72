"""Threads over blocks: operations of torch take one thread meanwhile, and all of them again."""

from collections.abc import Iterator

import pytest
import torch

from drophot._core.block_threads import map_torch

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_operations_take_one_thread_and_two_again_after_it() -> None:
    assert map_torch(lambda item: (item, torch.get_num_threads()), range(3), CPU) == [
        (0, 1),
        (1, 1),
        (2, 1),
    ]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_the_number_of_threads_is_restored_after_an_error_and_a_nested_call() -> None:
    def nested(_: int) -> list[int]:
        return map_torch(lambda _: torch.get_num_threads(), range(2), CPU)

    assert map_torch(nested, range(2), CPU) == [[1, 1], [1, 1]]
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError):
        map_torch(lambda item: 1 // item, range(2), CPU)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_on_another_device_the_items_come_one_after_the_other() -> None:
    found = map_torch(lambda _: torch.get_num_threads(), range(2), torch.device("meta"))
    assert found == [2, 2]
