"""The counterparts that the pages about migration name give the same numbers as the originals."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from drophot import DynamicsTracker, ForgettingTracker, magnitude_prune
from drophot.tracking import TDDS, Score

N, CLASSES, EPOCHS = 40, 3, 6


def presentations() -> tuple[Tensor, list[Tensor]]:
    """The targets of all samples, and their logits in each epoch."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(CLASSES, (N,), generator=generator)
    return targets, [torch.randn(N, CLASSES, generator=generator) for _ in range(EPOCHS)]


def tracked(*scores: Score) -> DynamicsTracker:
    targets, logits = presentations()
    tracker = DynamicsTracker(N, statistics=scores) if scores else DynamicsTracker(N)
    for epoch in logits:
        tracker.update(torch.arange(N), epoch, targets)
    return tracker


def test_traintools_counts_and_averages_the_same() -> None:
    traintools = pytest.importorskip("traintools", reason="traintools is not installed")
    targets, logits = presentations()
    aum, el2n = traintools.AUMTracker(), traintools.EL2NTracker()
    dynamics, forgetting = traintools.ExampleDynamicsTracker(), ForgettingTracker(N)
    for epoch in logits:
        for other in (aum, el2n, dynamics, forgetting):
            other.update(torch.arange(N), epoch, targets)
    ours = tracked()

    def theirs(tracker: Any, name: str) -> Tensor:
        examples = tracker.examples
        return torch.tensor([float(getattr(examples[i], name)) for i in range(N)])

    pairs = {
        "aum": theirs(aum, "aum"),
        "el2n": theirs(el2n, "score"),
        "confidence": theirs(dynamics, "mean_confidence"),
        "variability": theirs(dynamics, "confidence_variability"),
    }
    for name, expected in pairs.items():
        found = ours.columns()[name]
        torch.testing.assert_close(torch.as_tensor(found).float(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(forgetting.scores("zero").float(), theirs(dynamics, "forgetting_events"))


def test_aum_averages_the_same(tmp_path: Path) -> None:
    aum = pytest.importorskip("aum", reason="aum is not installed")
    targets, logits = presentations()
    calculator = aum.AUMCalculator(str(tmp_path), compressed=True)
    for epoch in logits:
        calculator.update(epoch, targets, list(range(N)))
    calculator.finalize()
    rows = (tmp_path / "aum_values.csv").read_text().splitlines()[1:]
    found = {int(name): float(value) for name, value in (row.split(",")[:2] for row in rows)}
    expected = torch.tensor([found[i] for i in range(N)])
    torch.testing.assert_close(tracked().scores("aum").float(), expected, atol=1e-4, rtol=1e-4)


class Margin:
    name = "margin"
    hard_end: Literal["low"] = "low"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        found = logits.softmax(1)
        others = found.scatter(1, targets[:, None], -1.0).amax(1)
        return found.gather(1, targets[:, None]).flatten() - others


def test_datacull_has_the_margin_of_probabilities(tmp_path: Path) -> None:
    datacull = pytest.importorskip("datacull", reason="datacull is not installed")
    targets, logits = presentations()

    class Data(torch.utils.data.Dataset[tuple[int, int]]):
        def __init__(self) -> None:
            self.targets = targets.numpy()

        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> tuple[int, int]:
            return index, int(targets[index])

    dataset, logger = datacull.DCDataset(Data()), datacull.DCLogger(f"{tmp_path}/")
    for number, epoch in enumerate(logits):
        logger.log_metric(number, torch.arange(N), epoch)
    expected = torch.from_numpy(
        datacull.AUMImportance(dataset, EPOCHS, logger).compute_importance()
    )
    ours = tracked(Margin()).scores("margin")
    torch.testing.assert_close(ours.float(), expected.float(), atol=1e-5, rtol=1e-5)


def test_torchao_keeps_the_same_two_of_four() -> None:
    path = "torchao.prototype.sparsity.sparsifier.weight_norm_sparsifier"
    ao = pytest.importorskip(path, reason="torchao is not installed, or no longer has sparsity")
    theirs, ours = nn.Sequential(nn.Linear(32, 16)), nn.Sequential(nn.Linear(32, 16))
    ours.load_state_dict(theirs.state_dict())
    pruner = ao.WeightNormSparsifier(
        sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2
    )
    pruner.prepare(theirs, [{"tensor_fqn": "0.weight"}])
    pruner.step()
    pruner.squash_mask()
    magnitude_prune(ours, 0.5, pattern="2:4")
    assert torch.equal(theirs[0].weight, ours[0].weight)


def test_tdds_takes_the_number_of_classes() -> None:
    scores = tracked(TDDS(num_classes=CLASSES, window=3, decay=0.9)).scores("tdds")
    assert scores.shape == (N,)
    assert scores.isfinite().all()
