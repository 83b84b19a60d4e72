"""No step waits for the device: seen on a GPU, and without one by what each operation is given."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import torchrun
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from drophot import DynamicsTracker, ForgettingTracker
from drophot.tracking.state import to_device

KINDS = [ForgettingTracker, DynamicsTracker]
N, B, C = 1000, 64, 10


class Devices(TorchDispatchMode):
    """Writes down the devices of what each operation takes, numbers included."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else [arg])]
        devices = {a.device.type for a in flat if isinstance(a, Tensor)}
        self.seen.setdefault(str(func), set()).update(devices)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_nothing_from_the_device_and_brings_nothing_to_it(kind: Any) -> None:
    """A meta tensor has no values: whoever asks for one fails, as whoever waits on a GPU would."""
    tracker = kind(N, device="meta")
    index = torch.zeros(B, dtype=torch.int64, device="meta")
    logits = torch.zeros(B, C, device="meta")
    with Devices() as devices:
        tracker.update(index, logits, index)
    assert len(devices.seen) > 10
    assert {d for found in devices.seen.values() for d in found} == {"meta"}, devices.seen


def test_the_test_above_can_fail() -> None:
    meta = torch.zeros(3, device="meta")
    with Devices() as devices:
        torch.add(meta, torch.tensor(1.0))
    assert "cpu" in {d for found in devices.seen.values() for d in found}


def test_what_comes_to_the_cpu_is_waited_for() -> None:
    """A copy from a GPU to the CPU that is not waited for is read before it is there."""
    waited: dict[str, bool] = {}

    class Copied(Tensor):
        def to(self, device: Any, dtype: Any, non_blocking: bool) -> Tensor:  # type: ignore[override]
            waited[device.type] = not non_blocking
            return self

    for device in ("cpu", "meta", "cuda"):
        to_device(torch.zeros(2).as_subclass(Copied), torch.device(device))
    assert waited == {"cpu": True, "meta": False, "cuda": False}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_on_the_cpu_and_logits_on_a_gpu(kind: Any) -> None:
    seen = [(i, z.cuda(), y.cuda()) for i, z, y in batches("cpu")]
    tracker = kind(N, device="cpu")
    for batch in seen:
        tracker.update(*batch)
    assert_as_on_a_cpu(tracker, seen)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def batches(device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    noise = torch.Generator().manual_seed(0)
    found = []
    for _ in range(20):
        index = torch.randint(N, (B,), generator=noise)
        found.append((index.to(device), torch.randn(B, C, generator=noise), index % C))
    return found


def assert_as_on_a_cpu(tracker: ForgettingTracker, seen: Any) -> None:
    plain = type(tracker)(N)
    for index, logits, targets in seen:
        plain.update(index.cpu(), logits.cpu(), targets.cpu())
    assert plain.counts.sum() > 0
    for name in ("counts", "learned", "presentations"):
        assert torch.equal(getattr(tracker, name).cpu(), getattr(plain, name))
    if isinstance(plain, DynamicsTracker) and isinstance(tracker, DynamicsTracker):
        for name in ("aum", "el2n", "confidence", "variability", "loss"):
            torch.testing.assert_close(
                tracker.scores(name, missing="nan").cpu(),
                plain.scores(name, missing="nan"),
                equal_nan=True,
                rtol=1e-4,
                atol=1e-5,
            )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("from_loader", ["cpu", "cuda"])
def test_no_step_waits_on_a_gpu(kind: Any, from_loader: str, request: Any) -> None:
    seen = [(i, z.cuda(), y.to(from_loader)) for i, z, y in batches(from_loader)]
    tracker = kind(N)
    tracker.update(*seen[0])  # here the state moves to the GPU
    request.getfixturevalue("no_waiting")
    for batch in seen[1:]:
        tracker.update(*batch)
    torch.cuda.set_sync_debug_mode("default")
    assert_as_on_a_cpu(tracker, seen)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_update_inside_a_captured_graph(kind: Any) -> None:
    seen = [tuple(part.cuda() for part in batch) for batch in batches("cuda")]
    tracker, model = kind(N, device="cuda"), nn.Identity()
    static = [part.clone() for part in seen[0]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        tracker.update(static[0], model(static[1]), static[2])
    torch.cuda.current_stream().wait_stream(stream)
    tracker.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tracker.update(static[0], model(static[1]), static[2])
    for batch in seen:
        for place, part in zip(static, batch, strict=True):
            place.copy_(part)
        graph.replay()
    assert_as_on_a_cpu(tracker, seen)


@pytest.mark.gpu
def test_a_wrong_index_on_a_gpu_is_raised_on_reading() -> None:
    tracker = ForgettingTracker(N, device="cuda")
    index = torch.tensor([3, N + 5], device="cuda")
    tracker.update(index, torch.zeros(2, C, device="cuda"), index % C)
    with pytest.raises(ValueError, match=rf"`index`.*{N + 5}"):
        tracker.scores()


@pytest.mark.gpu
@pytest.mark.parametrize("target", [-100, C])
@pytest.mark.parametrize("kind", KINDS)
def test_a_target_that_is_no_class_is_raised_on_reading(kind: Any, target: int) -> None:
    tracker, index = kind(N, device="cuda"), torch.tensor([3, 5], device="cuda")
    tracker.update(index, torch.zeros(2, C, device="cuda"), torch.tensor([1, target]).cuda())
    tracker.update(index, torch.zeros(2, C, device="cuda"), index % C)
    with pytest.raises(ValueError, match=rf"`targets`.*{target}.*sample 5"):
        _ = tracker.presentations


def there(x: Tensor) -> Tensor:
    return x.to("cuda", non_blocking=True)


def moved(model: Any, batches: Any) -> None:
    for x, _ in batches:
        z = there(x)
        model(z)
        model(z + 0.1)  # adversarial


def left_out(model: Any, batches: Any) -> None:
    for number, (x, _) in enumerate(batches):
        if number != 1:
            model(there(x))


def changed(model: Any, batches: Any) -> None:
    for x, _ in batches:
        model(2 * there(x))


def others_first(model: Any, batches: Any) -> None:
    for x, _ in batches:
        model(there(x.flip(0) + 1))
        model(there(x))


def ahead(model: Any, batches: Any) -> None:
    on_their_way = (there(x) for x, _ in batches)
    held = next(on_their_way)
    for z in on_their_way:
        model(held)
        held = z
    model(held)


@pytest.mark.gpu
@pytest.mark.parametrize("loop", [moved, left_out, changed, others_first, ahead])
@pytest.mark.parametrize("shape", [(4,), (1, 4, 4)])
def test_batches_are_told_apart_without_waiting(loop: Any, shape: Any, request: Any) -> None:
    """`watch` gives tensors on the CPU, and the model has only ever seen copies of them."""
    x, size = torch.randn(32, *shape), 8
    y = torch.arange(32) % C
    batches = [(x[i], y[i], i) for i in torch.arange(32).split(size)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), C)).cuda()
    tracker = DynamicsTracker(32, device="cuda")
    with tracker.attach(model):
        tracker.update(batches[0][2].cuda(), model(there(x[:size])), y[:size].cuda())
        tracker.reset()
        request.getfixturevalue("no_waiting")
        loop(model, tracker.watch(batches))
        torch.cuda.set_sync_debug_mode("default")
    if loop in (others_first, ahead):
        with pytest.raises(ValueError, match="`watch`.*`update"):
            _ = tracker.presentations
        return
    seen = torch.arange(4) != (1 if loop is left_out else 4)
    assert tracker.presentations.view(4, size)[:, 0].tolist() == seen.int().tolist()
    plain = DynamicsTracker(32, device="cuda")
    shown = 2 * x if loop is changed else x
    for i in torch.arange(32).split(size):
        plain.update(i, model(shown[i].cuda()), y[i])
    for name in ("aum", "loss"):
        found = tracker.scores(name, missing="nan").view(4, size)[seen]
        torch.testing.assert_close(found, plain.scores(name).view(4, size)[seen])


@pytest.mark.gpu
def test_two_trackers_on_one_model_that_see_copies_on_a_gpu() -> None:
    model, x = nn.Linear(4, C).cuda(), torch.randn(8, 4)
    one, two = ForgettingTracker(8), ForgettingTracker(8)
    one.attach(model)
    two.attach(model)
    batch = (x, torch.arange(8), torch.arange(8))
    walks = [iter(tracker.watch([batch])) for tracker in (one, two)]
    (z, _), _ = (next(walk) for walk in walks)
    with pytest.raises(ValueError, match="`watch`.*`update"):
        model(z.cuda())


@pytest.mark.skipif(not torch.distributed.is_nccl_available(), reason="torch has no NCCL")
@pytest.mark.gpu
def test_sync_over_nccl(tmp_path: Any) -> None:
    """One rank for each GPU there is; a state that is still on the CPU goes over as well."""
    torchrun(torch.cuda.device_count(), __file__, folder=tmp_path)


def main() -> None:
    """What a rank does in `test_sync_over_nccl`."""
    import torch.distributed as dist
    from helpers import ranks as worker

    dist.init_process_group("nccl")
    rank, count = dist.get_rank(), dist.get_world_size()
    torch.cuda.set_device(rank)
    size, parts = worker.CASES["chance"]
    for device in ("cuda", "cpu"):
        for kind in KINDS:
            tracker = worker.follow(kind(size, device=device), parts(rank, count))
            table = [None] * count
            dist.all_gather_object(table, tracker.presentations.tolist())
            assert all(row == table[0] for row in table), table
            assert tracker.presentations.sum() > 0
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
