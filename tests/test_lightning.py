"""The callback in a real Trainer: fit, validation, checkpoints, two processes."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import torchrun
from test_sync import assert_same, in_one_process
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from drophot import DynamicsTracker, ForgettingTracker, IndexedDataset

pl = pytest.importorskip("lightning.pytorch", reason="the extra `lightning` is not installed")
from drophot.integrations.lightning import TrackerCallback  # noqa: E402 - only where it is there

pytestmark = [
    # What Lightning advises on small loaders and absent validation, and its own use of torch.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec."),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]
SIZE = 40


def data() -> TensorDataset:
    inputs = torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


class Classifier(pl.LightningModule):
    """Remembers what it showed, so that a test can show it to a tracker again."""

    def __init__(self, answer: Any = lambda loss, logits: {"loss": loss, "logits": logits}) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.answer = nn.Linear(4, 2), answer
        self.shown: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets, index = batch
        logits = self.model(inputs)
        self.shown.append((self.current_epoch, index, logits.detach().clone(), targets))
        return self.answer(nn.functional.cross_entropy(logits, targets), logits)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


def loader(shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(IndexedDataset(data()), batch_size=7, shuffle=shuffle)


def trainer(folder: Path, callback: TrackerCallback, epochs: int = 4, **more: Any) -> Any:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[callback, *more.pop("callbacks", [])],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **more},
    )


def kept(folder: Path, **every: int) -> dict[str, Any]:
    keep = pl.callbacks.ModelCheckpoint(folder / "kept", save_last=True, save_top_k=0, **every)
    return {"callbacks": [keep], "enable_checkpointing": True}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_fit_presents_every_training_batch_and_nothing_else(
    tmp_path: Path, accumulate: int
) -> None:
    module, callback = Classifier(), TrackerCallback(DynamicsTracker(SIZE))
    runner = trainer(tmp_path, callback, accumulate_grad_batches=accumulate)
    runner.fit(module, loader(shuffle=True), DataLoader(data(), batch_size=9))
    assert callback.tracker.presentations.unique().tolist() == [4]
    assert_same(callback.tracker.state_dict(), in_one_process(SIZE, [module.shown]), 0.0)


def test_the_weights_are_those_of_a_training_without(tmp_path: Path) -> None:
    tracked, plain = Classifier(), Classifier()
    trainer(tmp_path, TrackerCallback(DynamicsTracker(SIZE))).fit(tracked, loader())
    runner = trainer(tmp_path, TrackerCallback(ForgettingTracker(SIZE)))
    runner.callbacks = [c for c in runner.callbacks if not isinstance(c, TrackerCallback)]
    runner.fit(plain, loader())
    assert torch.equal(tracked.model.weight, plain.model.weight)


@pytest.mark.parametrize("every", [{"every_n_epochs": 1}, {"every_n_train_steps": 6}])
def test_a_run_that_is_resumed_has_the_same_scores(tmp_path: Path, every: dict[str, int]) -> None:
    """`every_n_train_steps=6` is a whole epoch too; Lightning itself cannot go on inside one."""
    whole = TrackerCallback(DynamicsTracker(SIZE))
    trainer(tmp_path, whole).fit(Classifier(), loader())

    first = TrackerCallback(DynamicsTracker(SIZE))
    trainer(tmp_path, first, epochs=2, **kept(tmp_path, **every)).fit(Classifier(), loader())

    second = TrackerCallback(DynamicsTracker(SIZE))
    resumed = trainer(tmp_path, second, epochs=4, **kept(tmp_path, **every))
    resumed.fit(Classifier(), loader(), ckpt_path=str(tmp_path / "kept" / "last.ckpt"))
    assert second.tracker.presentations.unique().tolist() == [4]
    assert_same(second.tracker.state_dict(), whole.tracker.state_dict(), 0.0)


def test_a_checkpoint_of_another_training_set_is_refused(tmp_path: Path) -> None:
    callback = TrackerCallback(DynamicsTracker(SIZE))
    trainer(tmp_path, callback, epochs=1, **kept(tmp_path)).fit(Classifier(), loader())
    other = trainer(tmp_path, TrackerCallback(DynamicsTracker(SIZE + 1)), **kept(tmp_path))
    with pytest.raises(ValueError, match="should hold 41 samples"):
        other.fit(Classifier(), loader(), ckpt_path=str(tmp_path / "kept" / "last.ckpt"))


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (lambda loss, logits: loss, "a dict with the keys loss from Classifier"),
        (lambda loss, logits: {"loss": loss}, "a dict with the keys loss from Classifier"),
        (lambda loss, logits: {"loss": loss, "logits": [1]}, "the keys loss, logits"),
    ],
)
def test_a_step_without_logits_is_an_error_that_says_what_to_return(
    tmp_path: Path, answer: Any, found: str
) -> None:
    callback = TrackerCallback(ForgettingTracker(SIZE))
    with pytest.raises(TypeError, match=f"{found}.*`training_step` return"):
        trainer(tmp_path, callback).fit(Classifier(answer), loader())


def test_logits_and_targets_by_other_names(tmp_path: Path) -> None:
    callback = TrackerCallback(
        DynamicsTracker(SIZE),
        logits=lambda outputs: outputs["answer"],
        targets=lambda batch: batch[1],
    )
    module = Classifier(lambda loss, logits: {"loss": loss, "answer": logits})
    trainer(tmp_path, callback).fit(module, loader())
    assert_same(callback.tracker.state_dict(), in_one_process(SIZE, [module.shown]), 0.0)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_skipped_batch_is_not_presented(tmp_path: Path) -> None:
    callback, calls = TrackerCallback(DynamicsTracker(SIZE)), []

    def answer(loss: Tensor, logits: Tensor) -> Any:
        calls.append(loss)
        return {"loss": loss, "logits": logits} if len(calls) > 2 else None

    trainer(tmp_path, callback, epochs=1).fit(Classifier(answer), loader())
    assert callback.tracker.presentations.tolist() == [0] * 14 + [1] * 26


def test_a_loader_without_indices_is_an_error(tmp_path: Path) -> None:
    module = Classifier()
    module.training_step = lambda batch, batch_idx: {  # type: ignore[method-assign]
        "loss": module.model(batch[0]).sum(),
        "logits": module.model(batch[0]),
    }
    with pytest.raises(TypeError, match="wrap the dataset in IndexedDataset"):
        trainer(tmp_path, TrackerCallback(ForgettingTracker(SIZE))).fit(
            module, DataLoader(data(), batch_size=7)
        )


def test_wants_a_tracker() -> None:
    with pytest.raises(TypeError, match="Found int"):
        TrackerCallback(40)


def test_two_processes(tmp_path: Path) -> None:
    torchrun(2, __file__, str(tmp_path), folder=tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert {len(rank["shown"]) for rank in ranks} == {3 * 3}
    expected = in_one_process(SIZE, [rank["shown"] for rank in ranks])
    for rank in ranks:
        assert_same(rank["tracker"], expected, 1e-5)
        assert_same(rank["checkpoint"], rank["tracker"], 0.0)


def main(folder: Path) -> None:
    """What a rank does in `test_two_processes`."""
    module, callback = Classifier(), TrackerCallback(DynamicsTracker(SIZE))
    # Every third step is the last of an epoch, but the epoch has not ended yet.
    kept_inside = kept(folder, every_n_train_steps=3)
    runner = trainer(folder, callback, epochs=3, strategy="ddp", devices=2, **kept_inside)
    runner.fit(module, loader(shuffle=True))
    saved = torch.load(folder / "kept" / "last.ckpt", weights_only=True)
    found = {
        "shown": module.shown,
        "tracker": callback.tracker.state_dict(),
        "checkpoint": saved["callbacks"]["TrackerCallback"],
    }
    torch.save(found, folder / f"{runner.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
