"""The global generators are put back, of every device, and one thread draws at a time."""

import multiprocessing
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from drophot._core import random_state


def enter() -> None:
    with random_state.preserved_rng(seed=0):
        torch.rand(())


def test_a_thread_waits_for_another_and_enters_what_it_is_in_itself() -> None:
    order: list[str] = []

    def other() -> None:
        with random_state.preserved_rng():
            order.append("other")

    with random_state.exclusive():
        thread = threading.Thread(target=other)
        thread.start()
        enter()
        thread.join(0.2)
        order.append("this")
    thread.join()
    assert order == ["this", "other"]


def test_long_waiting_is_explained(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(random_state, "_SILENT_WAIT", 0.01)
    with random_state.exclusive():
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join(0.2)
    thread.join()
    assert len(caplog.records) == 1


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="no forks on this system"
)
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_fork_does_not_wait_for_a_thread_that_it_has_not() -> None:
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with random_state.exclusive():
            inside.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    child = multiprocessing.get_context("fork").Process(target=enter)
    child.start()
    child.join(60)
    done.set()
    thread.join()
    child.kill()
    assert child.exitcode == 0


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_devices_own_generator_is_seeded_and_put_back(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the device's part of torch."""
    stands = torch.tensor([1, 2, 3], dtype=torch.uint8)
    place: tuple[Any, ...] = () if kind == "mps" else (torch.device(kind),)
    now = [stands]

    def get(*where: Any) -> torch.Tensor:
        assert where == place
        return now[-1]

    def put(state: torch.Tensor, *where: Any) -> None:
        assert where == place
        now.append(state)

    stand_in = SimpleNamespace(
        get_rng_state=get,
        set_rng_state=put,
        manual_seed=lambda seed: now.append(torch.tensor([seed], dtype=torch.uint8)),
        device=lambda where: nullcontext(),
    )
    monkeypatch.setattr(torch, kind, stand_in)
    with random_state.preserved_rng(torch.device(kind), seed=7):
        assert now[-1].tolist() == [7]
    assert now[-1].tolist() == [1, 2, 3]
