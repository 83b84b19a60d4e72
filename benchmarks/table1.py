"""Which fault of the released code makes Table 1 of the paper positive.

Table 1 compares pruned and fine-tuned ResNet-18s that were trained on a coreset with the baseline,
which was trained on all samples. The released code has three faults (see
`drophot.pipeline.released_protocol`):

    scores      forgetting scores are noise
    masks       pruned weights grow back
    baseline    the baseline is trained in evaluation mode, so without BatchNorm

All eight combinations of the faults are run, with the random control, and each accuracy is
compared with that of the baseline of the same seed and the same faults. Networks that combinations
share are trained once. After being stopped or killed, the same command resumes: the records are
appended to benchmarks/results/table1_MODEL_DATA.jsonl one by one, and
`python benchmarks/paper.py --write` writes the results to docs/results.md.

    python benchmarks/table1.py cifar10 --data-root DIR        with DIR/train/CLASS/*.jpg
    python benchmarks/table1.py cifar100 --device cuda         through torchvision

The defaults are the paper's: all images, 10 epochs for each training, batches of 64, Adam with a
learning rate of 1e-3, no augmentation. `--samples` takes fewer images, for a CPU.
"""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from common import RESULTS
from faults import Faults
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from drophot import DropHot, Record
from drophot.models import resnet18, resnet50
from drophot.pipeline import RunProtocol, pruning_steps, selection_steps
from drophot.pipeline.config import RunConfig
from drophot.pipeline.provenance.run_record import record_of
from drophot.pipeline.released_protocol import PositionCounts, select
from drophot.records import from_line, to_line
from drophot.training.evaluation import evaluate

DATASETS = {"cifar10": CIFAR10, "cifar100": CIFAR100}
MODELS = {"resnet18": resnet18, "resnet50": resnet50}
COUNTS = {"cifar10": 10, "cifar100": 100}
MODES = ("low", "high", "random")


def protocol(faults: Faults) -> Any:
    """The protocol with some faults, by its name if the library has it."""
    if sum(faults) != 2:
        return faults.name
    return RunProtocol(
        name=faults.name,
        counter=_counts if faults.scores else None,
        select=select if faults.scores else None,
        holds_masks=not faults.masks,
        baseline_in_eval_mode=faults.baseline,
    )


class Job(NamedTuple):
    """The records whose networks share one scoring network."""

    seed: int
    scores: bool
    baseline: bool


def _counts(num_samples: int, seed: int) -> PositionCounts:
    return PositionCounts(num_samples, seed=seed)


def main() -> None:
    options = parsed()
    path: Path = options.out or RESULTS / f"table1_{options.model}_{options.data}.jsonl"
    path.write_text("".join(to_line(record) + "\n" for record in read(path)))  # without a torn line
    jobs = [Job(*each) for each in product(options.seeds, (False, True), (False, True))]
    start = perf_counter()
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(compute, options, path, job) for job in jobs]
        for finished in as_completed(running):
            finished.result()
            print(f"{len(read(path))} records after {perf_counter() - start:.0f} s", flush=True)


def parsed() -> Namespace:
    parser = ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("data", choices=list(DATASETS), help="the number of classes, 10 or 100")
    parser.add_argument("--model", default="resnet18", choices=list(MODELS))
    parser.add_argument("--data-root", default=None, help="a folder of images instead")
    parser.add_argument("--samples", type=int, default=0, help="of the training set; 0 is all")
    parser.add_argument("--test-samples", type=int, default=0, help="of the test set; 0 is all")
    parser.add_argument("--epochs", type=int, default=10, help="of each of the three trainings")
    parser.add_argument("--data-ratios", type=float, nargs="+", default=[0.3])
    parser.add_argument("--prune-ratios", type=float, nargs="+", default=[0.8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--out", type=Path, help="the file, if not table1_MODEL_DATA.jsonl")
    return parser.parse_args()


def compute(options: Namespace, path: Path, job: Job) -> None:
    """Compute the records of a job that the file does not hold yet, and append each to it."""
    torch.set_num_threads(1)
    held = {key(record) for record in read(path)}
    todo = list(missing(options, job, held))
    if not todo:
        return
    start = configured(options, job)
    scoring: selection_steps.Scoring | None = None
    networks: dict[tuple[str, float], tuple[nn.Module, Tensor, float]] = {}
    on_cpu = options.device == "cpu"
    with points_as_products() if on_cpu else nullcontext():
        for faults, mode, data_ratio, prune_ratio in todo:
            config = start.replace(
                protocol=protocol(faults),
                mode="random" if mode == "baseline" else mode,
                data_ratio=data_ratio,
                prune_ratio=prune_ratio,
                seed=job.seed,
            )
            if (mode, data_ratio) not in networks:
                if scoring is None and mode != "random":
                    scoring = selection_steps.score(config)
                networks[mode, data_ratio] = trained(config, scoring)
            model, indices, accuracy = networks[mode, data_ratio]
            pruned = pruning_steps.prune(config, deepcopy(model))
            finetuned = pruning_steps.finetune(config, pruned)
            record = record_of(
                config,
                indices=indices,
                trained_accuracy=accuracy,
                pruned_accuracy=pruned.accuracy,
                finetuned=finetuned,
                seconds={"finetune": finetuned.seconds},
            )
            with path.open("a") as file:
                file.write(to_line(record) + "\n")


def missing(
    options: Namespace, job: Job, held: set[tuple[object, ...]]
) -> Iterator[tuple[Faults, str, float, float]]:
    """The cells of a job that are not held.

    The baseline does not depend on the scores, nor a random subset on the scores or the baseline.
    """
    modes = MODES if not job.scores and not job.baseline else MODES[:2]
    cells = [(mode, ratio) for ratio in options.data_ratios for mode in modes]
    cells = cells if job.scores else [("baseline", 1.0), *cells]
    for (mode, ratio), prune_ratio, masks in product(cells, options.prune_ratios, (False, True)):
        faults = Faults(job.scores, masks, job.baseline)
        if (faults.name, mode, ratio, prune_ratio, job.seed) not in held:
            yield faults, mode, ratio, prune_ratio


def trained(
    config: RunConfig, scoring: selection_steps.Scoring | None
) -> tuple[nn.Module, Tensor, float]:
    """A network, its training samples and its accuracy. The scoring network is the baseline."""
    if config.keeps_all:
        assert scoring is not None
        everything = torch.arange(config.num_samples)
        return scoring.model, everything, evaluate(scoring.model, config.test_set)
    scores = None if scoring is None else scoring.scores
    selected = selection_steps.select(config, scores=scores)
    found = selection_steps.train(config, selected.indices)
    return found.model, selected.indices, found.accuracy


def configured(options: Namespace, job: Job) -> RunConfig:
    run = DropHot(
        partial(MODELS[options.model], COUNTS[options.data]),
        *(dataset(options, train=train) for train in (True, False)),
        data_ratio=0.5,  # each record sets this, the mode, the prune ratio and the protocol
        mode="high",
        prune_ratio=0.5,
        score_epochs=options.epochs,
        train_epochs=options.epochs,
        finetune_epochs=options.epochs,
        seed=job.seed,
        device=options.device,
    )
    return run.config


def dataset(options: Namespace, *, train: bool) -> Dataset[Any]:
    """Images in [-1, 1], in memory; with `--samples`, as many of each class."""
    scale = transforms.Normalize(0.5, 0.5)
    transform = transforms.Compose([transforms.ToTensor(), scale])
    if options.data_root is not None:
        folder = Path(options.data_root) / ("train" if train else "test")
        images: Any = ImageFolder(folder, transform)
    else:
        images = DATASETS[options.data]("data", train=train, transform=transform, download=True)
    targets = torch.as_tensor(images.targets)
    size = options.samples if train else options.test_samples
    each = size // COUNTS[options.data] or len(targets)
    kept = [(targets == label).nonzero().flatten()[:each] for label in range(targets.max() + 1)]
    indices = torch.cat(kept).sort().values
    # In an order without classes, as CIFAR's files are: the released code breaks ties by position.
    indices = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]
    inputs = torch.stack([images[i][0] for i in indices.tolist()])
    return TensorDataset(inputs, targets[indices])


@contextmanager
def points_as_products() -> Iterator[None]:
    """Let convolutions of single points be matrix products, which are ten times faster on a CPU.

    The last stage of a ResNet sees 1x1 points of 32x32 images, of which a padded 3x3 kernel only
    uses the middle. The results are equal up to rounding.
    """
    forward: Callable[..., Tensor] = nn.Conv2d.forward

    def faster(self: nn.Conv2d, inputs: Tensor) -> Tensor:
        point = inputs.shape[-2:] == (1, 1) and self.groups == 1 and self.bias is None
        if not point or self.kernel_size != (3, 3) or self.padding != (1, 1):
            return forward(self, inputs)
        return (inputs.flatten(1) @ self.weight[:, :, 1, 1].T)[..., None, None]

    nn.Conv2d.forward = faster  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Conv2d.forward = forward


def read(path: Path) -> list[Record]:
    """The records of a file, without a last line that was cut off."""
    text = path.read_text() if path.exists() else ""
    return [from_line(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def key(record: Record) -> tuple[object, ...]:
    return (record.protocol, record.mode, record.keep_ratio, record.prune_ratio, record.seed)


if __name__ == "__main__":
    main()
