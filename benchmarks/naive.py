"""The paper's grid with the method of the released code, for comparison in `benchmarks/grid.py`.

A loader whose workers read and transform each sample again in each epoch, the loss read back after
each step, and the network of every cell trained from scratch, one after the other. Scores are
computed once per seed over a shuffled loader. Weights are pruned layer by layer with
torch.nn.utils.prune, and the mask is dropped before fine-tuning.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, Dataset, Subset

Cell = tuple[str, float, float]  # mode, share kept, share removed


class Naive:
    def __init__(
        self,
        model: Callable[[], nn.Module],
        train_set: Dataset[Any],
        test_set: Dataset[Any],
        *,
        epochs: int,
        workers: int,
        device: torch.device,
    ) -> None:
        self.model, self.train_set, self.test_set = model, train_set, test_set
        self.epochs, self.workers, self.device = epochs, workers, device
        self.trained_on = 0  # samples

    def run(self, cells: Iterable[Cell]) -> dict[Cell, tuple[float, float, float]]:
        """Accuracies before and after pruning and after fine-tuning, cell by cell."""
        scores = self.score()
        return {cell: self.cell(scores, *cell) for cell in cells}

    def score(self) -> Tensor:
        model = self.model().to(self.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        scores = torch.zeros(len(self.train_set))  # type: ignore[arg-type]
        before = None
        for _ in range(self.epochs):
            self.train(model, optimizer, self.train_set)
            predictions = torch.cat([p for p, _ in self.predictions(model, self.train_set, True)])
            if before is not None:
                scores += predictions != before
            before = predictions
        return scores

    def cell(
        self, scores: Tensor, mode: str, data_ratio: float, prune_ratio: float
    ) -> tuple[float, float, float]:
        data = self.train_set
        if mode != "baseline":
            ranked = scores.argsort(descending=mode == "high")
            data = Subset(data, ranked[: int(data_ratio * len(scores))].tolist())
        model = self.model().to(self.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(self.epochs):
            self.train(model, optimizer, data)
        trained = self.accuracy(model)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                prune.l1_unstructured(module, "weight", prune_ratio)
                prune.remove(module, "weight")
        pruned = finetuned = self.accuracy(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(self.epochs):
            self.train(model, optimizer, self.train_set)
            finetuned = self.accuracy(model)
        return trained, pruned, finetuned

    def train(self, model: nn.Module, optimizer: Any, data: Dataset[Any]) -> float:
        total = 0.0
        model.train()
        for inputs, targets in self.loader(data, True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(
                model(inputs.to(self.device)), targets.to(self.device)
            )
            loss.backward()
            optimizer.step()
            total += loss.item()
            self.trained_on += len(inputs)
        return total

    def accuracy(self, model: nn.Module) -> float:
        right = 0
        for predictions, targets in self.predictions(model, self.test_set, False):
            right += (predictions == targets).sum().item()
        return right / len(self.test_set)  # type: ignore[arg-type]

    def predictions(
        self, model: nn.Module, data: Dataset[Any], shuffle: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        model.eval()
        with torch.no_grad():
            for inputs, targets in self.loader(data, shuffle):
                yield model(inputs.to(self.device)).argmax(1).cpu(), targets

    def loader(self, data: Dataset[Any], shuffle: bool) -> DataLoader[Any]:
        return DataLoader(data, batch_size=64, shuffle=shuffle, num_workers=self.workers)
