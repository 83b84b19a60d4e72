"""A pool of processes that share the GPUs of a machine."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import weakref
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import mkdtemp

import torch

from drophot._core import scalars
from drophot.grid import mps

_VISIBLE = "CUDA_VISIBLE_DEVICES"


class GpuPool(ProcessPoolExecutor):
    """Worker processes that share the GPUs of this machine, for :meth:`drophot.Grid.run`.

    Each worker sees one GPU, as `cuda:0`, and the workers are spread over the GPUs evenly. Several
    workers on one GPU compute at the same time under NVIDIA's multi-process service (MPS,
    https://docs.nvidia.com/deploy/mps). If it is not running, the pool starts it, for its workers
    only, and ends it when the pool is shut down. Without MPS, processes on one GPU take turns, and
    a grid on several of them is no faster than on one: see "One GPU" in `docs/executors.md`, which
    has figures.

    Like any process pool, use it under `if __name__ == "__main__":`, and in a `with` statement. It
    can be passed to everything that takes a `concurrent.futures.ProcessPoolExecutor`.

    Args:
        workers_per_gpu: The number of processes on each GPU. Small networks need more of them:
            8 were best for a ResNet-18 on 32×32 images, 14 for a LeNet. Each keeps one core of the
            CPU busy. `None` is 8, or the number of cores for each GPU if that is smaller.
        gpus: The numbers of the GPUs to use, as `torch.cuda` counts them; `None` is all.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is out of range, or a GPU is named twice.
        RuntimeError: If there is no GPU, or `workers_per_gpu` is above 1 and MPS cannot be started.

    Example:
        >>> import torch
        >>> if torch.cuda.is_available():
        ...     with GpuPool(workers_per_gpu=2) as pool:  # or grid.run("store", pool)
        ...         assert pool.submit(torch.cuda.device_count).result() == 1
    """

    def __init__(
        self, workers_per_gpu: int | None = None, gpus: Iterable[int] | None = None
    ) -> None:
        names = _names(gpus)
        if workers_per_gpu is None:
            each = max(1, min(8, (os.cpu_count() or 1) // len(names)))
        else:
            each = scalars.integer("workers_per_gpu", workers_per_gpu, least=1)
        self.num_gpus = len(names)
        folder = _service() if each > 1 and not mps.is_running() else None
        context = multiprocessing.get_context("spawn")
        assigned = context.SimpleQueue()
        for name in each * names:
            assigned.put(name)
        super().__init__(
            each * len(names),
            mp_context=context,
            initializer=_use_one_gpu,
            initargs=(assigned, None if folder is None else str(folder)),
        )
        self._end_service = None if folder is None else weakref.finalize(self, _end, folder)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the workers, as any process pool does, and then the service that the pool started."""
        super().shutdown(wait, cancel_futures=cancel_futures)
        if wait and self._end_service is not None:
            self._end_service()


def _names(gpus: Iterable[int] | None) -> list[str]:
    """The names of GPUs by which `CUDA_VISIBLE_DEVICES` takes them in any process."""
    count = torch.cuda.device_count()
    if count == 0:
        raise RuntimeError(
            "GpuPool needs a GPU, but torch.cuda finds none. For CPUs, pass a "
            "concurrent.futures.ProcessPoolExecutor to Grid.run."
        )
    if gpus is None:
        numbers = list(range(count))
    else:
        numbers = [scalars.integer("gpus", gpu, least=0) for gpu in gpus]
    if not numbers or len(set(numbers)) < len(numbers) or max(numbers) >= count:
        raise ValueError(
            f"`gpus` must be different numbers below {count}, the number of GPUs, got {numbers}. "
            f"Leave it out to use all."
        )
    visible = [name.strip() for name in os.environ.get(_VISIBLE, "").split(",")]
    if len(visible) == count and all(name.startswith("MIG-") for name in visible):
        return [visible[number] for number in numbers]
    return [f"GPU-{_uuid(number)}" for number in numbers]


def _uuid(number: int) -> str:
    # torch has no type for the properties of a device.
    return str(torch.cuda.get_device_properties(number).uuid)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def _service() -> Path:
    """Start MPS in a new folder."""
    folder = Path(mkdtemp(prefix="mps-"))  # short: the paths of sockets have at most 107 letters
    if why := mps.start(folder):
        shutil.rmtree(folder, ignore_errors=True)
        raise RuntimeError(
            f"`workers_per_gpu` can be above 1 only with NVIDIA's multi-process service, but "
            f"{why}. Pass workers_per_gpu=1, or start the service yourself "
            f"(nvidia-cuda-mps-control -d)."
        )
    return folder


def _end(folder: Path) -> None:
    mps.stop(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _use_one_gpu(assigned: multiprocessing.SimpleQueue[str], service: str | None) -> None:
    """Restrict a new worker to the next GPU, before it uses CUDA."""
    if torch.cuda.is_initialized():
        raise RuntimeError(
            "The workers of GpuPool import your script, and it used CUDA when it was imported. "
            'Move such code under `if __name__ == "__main__":`.'
        )
    os.environ[_VISIBLE] = assigned.get()
    if service is not None:
        os.environ[mps.FOLDER] = service
