"""The callback in a real Trainer: fit, validation, checkpoints, two processes."""

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import processes
from helpers.one_process import assert_same, in_one_process
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from drophot import DynamicsTracker, ForgettingTracker, IndexedDataset
from drophot.__main__ import main as command_line

pl = pytest.importorskip("lightning.pytorch", reason="the extra `lightning` is not installed")
from drophot.integrations.lightning import TrackerCallback  # noqa: E402 - only where it is there

pytestmark = [
    pytest.mark.slow,
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

    def __init__(self, answer: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.answer = nn.Linear(4, 2), answer or together
        self.shown: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def configure_model(self) -> None:
        """Nothing to do, and ModelParallelStrategy asks for it."""

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


def test_the_command_line_reads_a_checkpoint_with_a_class_among_its_hyperparameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Configured(Classifier):
        def __init__(self, activation: type[nn.Module], folder: Path) -> None:
            super().__init__()
            self.save_hyperparameters()

    callback = TrackerCallback(DynamicsTracker(SIZE))
    runner = trainer(tmp_path, callback, epochs=1)
    runner.fit(Configured(nn.GELU, tmp_path), loader())
    runner.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert command_line(["suspects", str(tmp_path / "last.ckpt"), "--number", "3"]) == 0
    lowest = callback.tracker.scores("aum").argsort()[:3]
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [int(line.split(",")[0]) for line in lines] == lowest.tolist()


def test_a_checkpoint_of_another_training_set_is_refused(tmp_path: Path) -> None:
    callback = TrackerCallback(DynamicsTracker(SIZE))
    trainer(tmp_path, callback, epochs=1, **kept(tmp_path)).fit(Classifier(), loader())
    other = trainer(tmp_path, TrackerCallback(DynamicsTracker(SIZE + 1)), **kept(tmp_path))
    with pytest.raises(ValueError, match="`state_dict`.*41 samples"):
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
    with pytest.raises(TypeError, match=f"{found}.*`training_step`"):
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
    with pytest.raises(TypeError, match="index.*IndexedDataset"):
        trainer(tmp_path, TrackerCallback(ForgettingTracker(SIZE))).fit(
            module, DataLoader(data(), batch_size=7)
        )


def test_wants_a_tracker() -> None:
    with pytest.raises(TypeError, match="`tracker`.*int"):
        TrackerCallback(40)


class Dicts(Dataset[Any]):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, i: int) -> dict[str, Any]:
        inputs, target = data()[i]
        return {"inputs": inputs, "labels": target}


class Steps(Classifier):
    """A Classifier with a training step of the test's."""

    def __init__(self, step: Any, manual: bool = False) -> None:
        super().__init__()
        self.step, self.automatic_optimization = step, not manual

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)


def classified(module: Any, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    logits = module.model(inputs)
    return {"loss": nn.functional.cross_entropy(logits, targets), "logits": logits}


def changes_its_batch(module: Any, batch: Any) -> Any:
    del batch["index"]
    answer = classified(module, batch["inputs"], batch["labels"].clone())
    batch["labels"].fill_(0)
    batch.clear()
    return answer


def takes_from_an_iterator(module: Any, dataloader_iter: Any) -> Any:
    batch, _, _ = next(dataloader_iter)
    return classified(module, *batch[:2])


def plain() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(SIZE, 4)), batch_size=7)


BATCHES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "changed by the step": (
        changes_its_batch,
        lambda: DataLoader(IndexedDataset(Dicts()), batch_size=7),
        {},
    ),
    "dict of loaders": (
        lambda module, batch: classified(module, *batch["a"][:2]),
        lambda: {"a": loader(), "b": plain()},
        {"batch": lambda batch: batch["a"]},
    ),
    "list of loaders": (
        lambda module, batch: classified(module, *batch[1][:2]),
        lambda: [plain(), loader()],
        {"batch": lambda batch: batch[1]},
    ),
    "a part that ends first": (
        lambda module, batch: (
            {"loss": module.model(batch["b"][0]).sum()}
            if batch["a"] is None
            else classified(module, *batch["a"][:2])
        ),
        lambda: pl.utilities.CombinedLoader(
            {"a": loader(), "b": DataLoader(TensorDataset(torch.randn(60, 4)), batch_size=7)},
            "max_size",
        ),
        {"batch": lambda batch: batch["a"]},
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_other_kinds(tmp_path: Path, name: str) -> None:
    step, loaders, options = BATCHES[name]
    callback = TrackerCallback(DynamicsTracker(SIZE), **options)
    trainer(tmp_path, callback, epochs=2).fit(Steps(step), loaders())
    assert callback.tracker.presentations.unique().tolist() == [2]
    assert callback.tracker.columns()["target"].tolist() == data().tensors[1].tolist()


@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")
def test_a_step_that_takes_its_batch_from_an_iterator(tmp_path: Path) -> None:
    class Iterating(Classifier):
        def training_step(  # pyright: ignore[reportIncompatibleMethodOverride] # by its name
            self, dataloader_iter: Any
        ) -> Any:
            return takes_from_an_iterator(self, dataloader_iter)

    callback = TrackerCallback(DynamicsTracker(SIZE))
    trainer(tmp_path, callback, epochs=2).fit(Iterating(), loader())
    assert callback.tracker.presentations.unique().tolist() == [2]


def test_several_loaders_without_a_part_are_an_error_that_names_batch(tmp_path: Path) -> None:
    for loaders in ({"a": loader(), "b": plain()}, [loader(), plain()]):
        callback = TrackerCallback(DynamicsTracker(SIZE))
        with pytest.raises(TypeError, match="`batch`.*a (dict|list)"):
            trainer(tmp_path, callback).fit(
                Steps(
                    lambda module, batch: classified(module, torch.ones(2, 4), torch.ones(2).long())
                ),
                loaders,
            )


def test_two_trackers_in_one_trainer_and_its_checkpoint(tmp_path: Path) -> None:
    def callbacks() -> list[TrackerCallback]:
        return [
            TrackerCallback(
                ForgettingTracker(SIZE), state_key=key, batch=lambda batch, k=key: batch[k]
            )
            for key in ("a", "b")
        ]

    step = lambda module, batch: classified(module, *batch["a"][:2])  # noqa: E731
    loaders = {"a": loader(), "b": loader()}
    first, other = callbacks()
    options = kept(tmp_path)
    options["callbacks"].append(other)
    trainer(tmp_path, first, epochs=1, **options).fit(Steps(step), loaders)
    second, other = callbacks()
    other._presenter.tracker.update_correct(torch.tensor([0]), torch.tensor([True]))
    options = kept(tmp_path)
    options["callbacks"].append(other)
    trainer(tmp_path, second, epochs=2, **options).fit(
        Steps(step), loaders, ckpt_path=str(tmp_path / "kept" / "last.ckpt")
    )
    for callback in (second, other):
        assert callback.tracker.presentations.unique().tolist() == [2]


def optimised(module: Any, batch: Any) -> Any:
    answer = classified(module, *batch[:2])
    module.optimizers().zero_grad()
    module.manual_backward(answer["loss"])
    module.optimizers().step()
    return answer


def test_manual_optimisation_may_skip_batches(tmp_path: Path) -> None:
    callback = TrackerCallback(DynamicsTracker(SIZE))
    step = lambda module, batch: None if 3 in batch[2] else optimised(module, batch)  # noqa: E731
    trainer(tmp_path, callback, epochs=2).fit(Steps(step, manual=True), loader())
    assert callback.tracker.presentations.tolist() == [0] * 7 + [2] * 33


def test_a_pass_for_batch_norm_alone_is_not_counted(tmp_path: Path) -> None:
    class Normalised(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))

    module, callback = Normalised(), TrackerCallback(DynamicsTracker(SIZE))
    average = pl.callbacks.StochasticWeightAveraging(0.1, swa_epoch_start=2)
    trainer(tmp_path, callback, epochs=4, callbacks=[average]).fit(module, loader())
    assert module.shown[-1][0] == 4, "there was a fifth pass"
    assert callback.tracker.presentations.unique().tolist() == [4]
    trained = [shown for shown in module.shown if shown[0] < 4]
    assert_same(callback.tracker.state_dict(), in_one_process(SIZE, [trained]), 0.0)


def joined() -> DataLoader[Any]:
    parts = [IndexedDataset(Subset(data(), range(*ends))) for ends in ((0, 20), (20, SIZE))]
    return DataLoader(ConcatDataset(parts), batch_size=7)


@pytest.mark.parametrize(
    ("loaders", "part"),
    [(joined, None), (lambda: {"a": joined(), "b": plain()}, "a"), (lambda: [joined()], 0)],
)
def test_samples_that_share_an_index_are_refused(tmp_path: Path, loaders: Any, part: Any) -> None:
    pick = None if part is None else lambda batch: batch[part]
    step = lambda module, batch: classified(module, *(pick(batch) if pick else batch)[:2])  # noqa: E731
    callback = TrackerCallback(DynamicsTracker(SIZE), batch=pick)
    with pytest.raises(ValueError, match="ConcatDataset of 2 IndexedDatasets"):
        trainer(tmp_path, callback, epochs=1).fit(Steps(step), loaders())
    assert callback.tracker.presentations.sum() == 0


def test_an_epoch_of_which_nothing_was_counted_is_an_error(tmp_path: Path) -> None:
    callback = TrackerCallback(DynamicsTracker(SIZE))
    step = lambda module, batch: optimised(module, batch) and None  # noqa: E731
    with pytest.raises(RuntimeError, match="Steps.training_step"):
        trainer(tmp_path, callback).fit(Steps(step, manual=True), loader())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_without_a_tracker_is_said(tmp_path: Path) -> None:
    runner = trainer(tmp_path, TrackerCallback(DynamicsTracker(SIZE)), epochs=1, **kept(tmp_path))
    runner.callbacks = [c for c in runner.callbacks if not isinstance(c, TrackerCallback)]
    runner.fit(Classifier(), loader())
    callback = TrackerCallback(DynamicsTracker(SIZE))
    with pytest.warns(UserWarning, match="'TrackerCallback'.*ModelCheckpoint"):
        trainer(tmp_path, callback, epochs=3).fit(
            Classifier(), loader(), ckpt_path=str(tmp_path / "kept" / "last.ckpt")
        )
    assert callback.tracker.presentations.unique().tolist() == [2]


def labelled_twice(module: Any, batch: Any) -> Any:
    logits = module.model(batch[0])
    return {"loss": nn.functional.mse_loss(logits, batch[1]), "logits": logits}


def test_any_other_task_by_a_judgement_of_ones_own(tmp_path: Path) -> None:
    inputs = data().tensors[0]
    both = DataLoader(IndexedDataset(TensorDataset(inputs, (inputs[:, :2] > 0).float())), 7)
    seen: list[Tensor] = []

    def correct(batch: Any, outputs: Any) -> Tensor:
        right = ((outputs["logits"] > 0) == batch[1].bool()).all(1)
        seen.append(right)
        return right

    callback = TrackerCallback(ForgettingTracker(SIZE), correct=correct)
    trainer(tmp_path, callback, epochs=1).fit(Steps(labelled_twice), both)
    assert callback.tracker.presentations.unique().tolist() == [1]
    assert callback.tracker.learned.tolist() == torch.cat(seen).tolist()
    with pytest.raises(TypeError, match="float32.*`TrackerCallback.*correct="):
        trainer(tmp_path, TrackerCallback(ForgettingTracker(SIZE))).fit(Steps(labelled_twice), both)
    with pytest.raises(TypeError, match="`correct`.*DynamicsTracker"):
        TrackerCallback(DynamicsTracker(SIZE), correct=correct)


def test_a_copy_of_the_callback_is_on_its_own(tmp_path: Path) -> None:
    callback = TrackerCallback(DynamicsTracker(SIZE))
    for again in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        trainer(tmp_path, again, epochs=1).fit(Classifier(), loader())
        assert again.tracker.presentations.unique().tolist() == [1]


def test_processes_that_fit_launches_bring_the_state_back(tmp_path: Path) -> None:
    """Three epochs by two forks, three more by a process that is spawned and imports all again.

    They are started by a process that has not used torch before.
    """
    output = tmp_path / "output"
    process = processes.begin(launched, tmp_path, folder=tmp_path, output=output)
    processes.finish(process, errors=output)
    found = torch.load(tmp_path / "launched.pt")
    assert found == {"ddp_fork": [3], "ddp_spawn": [6], "files": []}


def launched(folder: Path) -> None:
    """What `test_processes_that_fit_launches_bring_the_state_back` runs."""
    os.environ["TMPDIR"] = str(folder / "temporary")
    Path(os.environ["TMPDIR"]).mkdir()
    callback = TrackerCallback(DynamicsTracker(SIZE), targets=second)
    found: dict[str, Any] = {}
    for strategy, devices in (("ddp_fork", 2), ("ddp_spawn", 1)):
        runner = trainer(folder, callback, epochs=3, strategy=strategy, devices=devices)
        runner.fit(Classifier(together), loader(shuffle=True))
        found[strategy] = callback.tracker.presentations.unique().tolist()
    found["files"] = [path.name for path in Path(os.environ["TMPDIR"]).rglob("*.pt")]
    torch.save(found, folder / "launched.pt")


def together(loss: Tensor, logits: Tensor) -> dict[str, Tensor]:
    return {"loss": loss, "logits": logits}


def second(batch: Any) -> Tensor:
    return batch[1]


def test_two_processes(tmp_path: Path) -> None:
    processes.ranks(2, main, tmp_path, folder=tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_same(torch.load(tmp_path / "failed.pt"), ranks[0]["first epoch"], 0.0)
    for rank in ranks:
        assert rank["shared"] == {"by itself": [3], "by a group": [3]}
    assert {len(rank["shown"]) for rank in ranks} == {3 * 3}
    expected = in_one_process(SIZE, [rank["shown"] for rank in ranks])
    for rank in ranks:
        assert_same(rank["tracker"], expected, 1e-5)
        assert_same(rank["checkpoint"], rank["tracker"], 0.0)


class Failure(pl.Callback):
    """Both ranks fail at one step; rank 0 alone asks for the state, as on losing the other."""

    def __init__(self, folder: Path, tracked: TrackerCallback) -> None:
        self.folder, self.tracked, self.first = folder, tracked, {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 4:
            raise OSError("failed")

    def on_train_epoch_end(self, *_: Any) -> None:
        self.first = self.tracked.tracker.state_dict()

    def on_exception(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank == 0:
            torch.save(self.tracked.state_dict(), self.folder / "failed.pt")


def main(folder: Path) -> None:
    """What a rank does in `test_two_processes`."""
    module, callback = Classifier(), TrackerCallback(DynamicsTracker(SIZE))
    # Every third step is the last of an epoch, but the epoch has not ended yet.
    kept_inside = kept(folder, every_n_train_steps=3)
    runner = trainer(folder, callback, epochs=3, strategy="ddp", devices=2, **kept_inside)
    runner.fit(module, loader(shuffle=True))
    saved = torch.load(folder / "kept" / "last.ckpt", weights_only=True)
    rank = runner.global_rank
    found: dict[str, Any] = {
        "shown": module.shown,
        "tracker": callback.tracker.state_dict(),
        "checkpoint": saved["callbacks"]["TrackerCallback"],
    }
    callback = TrackerCallback(DynamicsTracker(SIZE))
    failure = Failure(folder, callback)
    runner = trainer(folder, callback, strategy="ddp", devices=2, callbacks=[failure])
    with pytest.raises(OSError, match="failed"):
        runner.fit(Classifier(), loader(shuffle=True))
    found["first epoch"] = failure.first
    groups = [torch.distributed.new_group([member]) for member in range(2)]
    parallel = pl.strategies.ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    shared = {}
    for name, strategy, group in (
        ("by itself", parallel, None),
        ("by a group", "ddp", lambda _: groups[rank]),
    ):
        callback = TrackerCallback(DynamicsTracker(SIZE), group=group)
        options = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
        trainer(folder, callback, epochs=3, **options).fit(Classifier(), loader())
        shared[name] = callback.tracker.presentations.unique().tolist()
    torch.save(found | {"shared": shared}, folder / f"{rank}.pt")
