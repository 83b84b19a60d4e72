"""`update` on a GPU as one launch: what a CPU can tell about it, and what a GPU has to."""

import importlib.util
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from drophot import DynamicsTracker, ForgettingTracker
from drophot.tracking import fused_update

KINDS = [ForgettingTracker, DynamicsTracker]
N, B, C = 50, 16, 10
triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="torch comes without Triton here"
)
no_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ, reason="the kernel works"
)


@pytest.mark.slow
@triton
@pytest.mark.parametrize(
    ("dtype", "values", "squares"),
    [("fp32", 0, 0), ("fp64", 0, 0), ("fp32", 15, 15), ("bf16", 15, 4)],
)
def test_the_kernel_compiles_for_a_gpu_and_fuses_no_operations(
    dtype: str, values: int, squares: int
) -> None:
    """A fused multiply-add would round once where the means rely on two roundings."""
    code = compiled(dtype, values, squares)
    assert ("div.rn.f32" in code) == (values > 0)
    assert "fma.rn.f32" not in code


def compiled(dtype: str, values: int, squares: int) -> str:
    """The kernel in PTX, for an A100."""
    tl = pytest.importorskip("triton.language")
    compiler = pytest.importorskip("triton.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 80, 32)
    from drophot.tracking.fused_kernel import _present

    types = {"index": "*i64", "logits": f"*{dtype}", "targets": "*i32"}
    types |= {"history": "*i64", "first_targets": "*i32", "fault": "*i64", "num_samples": "i64"}
    types |= {"num_rows": "i32", "num_classes": "i32"}
    types |= dict.fromkeys(("index_stride", "row_stride", "class_stride", "targets_stride"), "i64")
    if values:
        types |= {"means": "*fp32", "tails": "*i8"}
    if squares:
        names = ("margin_squares", "error_squares", "confidence_squares", "loss_squares")
        types |= dict.fromkeys(names, "*fp32")
    fixed: dict[str, Any] = {
        "value_bits": values,
        "square_bits": squares,
        "class_block": 32,
        "index_block": 256,
    }
    fixed["dtype"] = tl.float64 if dtype == "fp64" else tl.float32
    names = _present.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {name: fixed.get(name) for name in names if name not in types}
    if "constexprs" in inspect.signature(compiler.ASTSource).parameters:
        constants = {(names.index(name),): value for name, value in constants.items()}
    source = compiler.ASTSource(_present, signature, constants)
    options = {"num_warps": 1, "enable_fp_fusion": False}
    return compiler.compile(source, target=target, options=options).asm["ptx"]


class Operations(TorchDispatchMode):
    """Writes down every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def batches(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor, Tensor]]:
    noise = torch.Generator().manual_seed(0)
    found = []
    for _ in range(20):
        index = torch.randint(N, (B,), generator=noise, device="cpu")
        logits = 3 * torch.randn(B, C, generator=noise, device="cpu")
        found.append((index, logits.to(dtype), index % C))
    return found


def assert_equal(found: ForgettingTracker, expected: ForgettingTracker) -> None:
    assert expected.counts.sum() > 0
    for name in ("counts", "learned", "presentations"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name))
    if isinstance(expected, DynamicsTracker) and isinstance(found, DynamicsTracker):
        for name in expected.statistics:
            torch.testing.assert_close(
                found.scores(name, missing="nan").cpu(),
                expected.scores(name, missing="nan"),
                equal_nan=True,
                rtol=1e-5,
                atol=1e-6,
            )


def followed(tracker: Any, seen: Any) -> Any:
    for batch in seen:
        tracker.update(*batch)
    return tracker


@no_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_where_the_kernel_cannot_be_launched_plain_operations_take_over(
    kind: Any, monkeypatch: Any, caplog: Any
) -> None:
    plain = followed(kind(N), batches())
    monkeypatch.setattr(fused_update, "_is_gpu", lambda tensor: True)  # Triton finds none
    monkeypatch.setattr(fused_update, "_works", {})
    with caplog.at_level("INFO", "drophot"), Operations() as operations:
        found = followed(kind(N), batches())
    assert operations.seen.count("drophot.present.default") == 1  # the first batch only
    assert "Triton" in caplog.text
    assert_equal(found, plain)


@no_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_is_never_compiled_inside_a_capture(kind: Any, monkeypatch: Any) -> None:
    plain = followed(kind(N), batches())
    monkeypatch.setattr(fused_update, "_is_gpu", lambda tensor: True)
    monkeypatch.setattr(fused_update, "_works", {})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    selected: list[Tensor] = []  # only the device of the logits has a stream that is captured

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        selected.append(tensor)
        yield
        selected.pop()

    monkeypatch.setattr("torch.cuda.device_of", device_of)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: len(selected) == 1)
    with Operations() as operations:
        found = followed(kind(N), batches())
    assert "drophot.present.default" not in operations.seen
    assert_equal(found, plain)


@no_gpu
@pytest.mark.parametrize("version", [None, "6.4"])
def test_a_gpu_of_rocm_takes_plain_operations(version: str | None, monkeypatch: Any) -> None:
    monkeypatch.setattr("torch.version.hip", version)
    device: Any = SimpleNamespace(is_cuda=True)
    assert fused_update._is_gpu(device) == (version is None)


class Subclass(Tensor):
    pass


class Top:
    name = "top"
    hard_end = "low"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.amax(1)


@no_gpu
@pytest.mark.parametrize("case", ["many rows", "a subclass", "own scores", "on a CPU"])
def test_batches_that_the_kernel_cannot_take(case: str, monkeypatch: Any) -> None:
    tracker, rows = DynamicsTracker(N), 4
    if case == "own scores":
        tracker = DynamicsTracker(N, statistics=["aum", Top()])
    if case == "many rows":
        rows = 5000
    index = torch.arange(rows) % N
    logits = torch.randn(rows, C)
    if case == "a subclass":
        logits = logits.as_subclass(Subclass)
    if case != "on a CPU":
        monkeypatch.setattr(fused_update, "_is_gpu", lambda tensor: True)
    with Operations() as operations:
        tracker.update(index, logits, index % C)
    assert "drophot.present.default" not in operations.seen
    assert tracker.presentations.sum() == rows


@pytest.mark.gpu
@triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_gpu_counts_as_a_cpu_does(kind: Any, dtype: torch.dtype) -> None:
    seen = batches(dtype)
    moved = [tuple(part.cuda() for part in batch) for batch in seen]
    with Operations() as operations:
        found = followed(kind(N, device="cuda"), moved)
    assert operations.seen == ["drophot.present.default"] * len(seen)
    assert True in fused_update._works.values()
    assert_equal(found, followed(kind(N), seen))


@pytest.mark.gpu
@triton
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_one_kernel(kind: Any) -> None:
    tracker = kind(N, device="cuda")
    seen = [tuple(part.cuda() for part in batch) for batch in batches()]
    followed(tracker, seen[:1])
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        followed(tracker, seen[1:])
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    assert [name for name in on_device if "Sync" not in name] == ["_present"] * (len(seen) - 1)


@pytest.mark.gpu
@triton
@pytest.mark.parametrize("kind", KINDS)
def test_many_classes_that_are_not_contiguous_on_a_gpu(kind: Any) -> None:
    index, classes = torch.tensor([3, 8, 3, 1], device="cpu"), 5000
    logits = 5 * torch.randn(3, classes, 4, device="cpu")
    seen = [(index, part.t(), index * 600) for part in logits]
    moved = [tuple(part.cuda() for part in batch) for batch in seen]
    found = followed(kind(N, device="cuda"), moved)
    plain = followed(kind(N), seen)
    assert torch.equal(found.presentations.cpu(), plain.presentations)
    assert torch.equal(found.learned.cpu(), plain.learned)
    if kind is DynamicsTracker:
        for name in plain.statistics:
            torch.testing.assert_close(
                found.scores(name, missing="nan").cpu(),
                plain.scores(name, missing="nan"),
                equal_nan=True,
                rtol=1e-5,
                atol=1e-6,
            )


@pytest.mark.gpu
@triton
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_on_a_gpu(kind: Any) -> None:
    torch.compiler.reset()
    seen = batches()
    tracker = kind(N, device="cuda")

    @torch.compile(fullgraph=True)
    def step(index: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        tracker.update(index, logits * 1.0, targets)
        return logits.sum()

    for batch in seen:
        step(*(part.cuda() for part in batch))
    assert_equal(tracker, followed(kind(N), seen))


@pytest.mark.gpu
@triton
@pytest.mark.parametrize("kind", KINDS)
def test_a_capture_with_other_memory_than_the_steps_before_compiles_nothing(kind: Any) -> None:
    """A batch may lie at any address, and its last dimension may have any stride."""
    tracker = kind(N, device="cuda")
    index = torch.arange(B + 1, device="cuda")[1:]
    logits = torch.randn(B, C + 1, device="cuda")[:, 1:]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        tracker.update(index, logits, index % C)
    torch.cuda.current_stream().wait_stream(stream)
    static = [index.clone(), logits.clone(), index % C]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tracker.update(*static)
    for _ in range(3):
        graph.replay()
    assert tracker.presentations[1 : B + 1].tolist() == [4] * B


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
@triton
@pytest.mark.parametrize("kind", KINDS)
def test_a_tracker_on_another_gpu_than_the_current_one(kind: Any) -> None:
    moved = [tuple(part.to("cuda:1") for part in batch) for batch in batches()]
    found = followed(kind(N, device="cuda:1"), moved)
    assert torch.cuda.current_device() == 0
    assert_equal(found, followed(kind(N), batches()))


@pytest.mark.gpu
@triton
def test_fit_with_a_tracker_on_a_gpu() -> None:
    from drophot import IndexedDataset, fit

    images, targets = torch.randn(64, 6, device="cpu"), torch.arange(64, device="cpu") % 3
    data = IndexedDataset(torch.utils.data.TensorDataset(images, targets))
    model = nn.Linear(6, 3).cuda()
    tracker = DynamicsTracker(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(model, data, 5, optimizer=optimizer, batch_size=16, on_batch=tracker.update)
    assert tracker.presentations.tolist() == [5] * 64
    assert all(fused_update._works.values())
