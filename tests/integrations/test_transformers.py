"""The tracker in a real Trainer, with a tiny text classifier made here."""

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import processes
from helpers.one_process import assert_same, in_one_process
from torch import Tensor

from drophot import DynamicsTracker, ForgettingTracker, IndexedDataset

transformers = pytest.importorskip("transformers", reason="`transformers` is not installed")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
from drophot.integrations.transformers import (  # noqa: E402 - only where it is there
    TrackedTrainer,
    TrackerMixin,
)

pytestmark = [
    pytest.mark.slow,
    # Warnings of its own, or of old versions of it.
    pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator is found"),
    pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast"),
]
SIZE = 22


def tokenizer() -> Any:
    """Words are tokens; the first word of a text is its number, so that a text can be told."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "good", "bad", "film", *(f"no{i}" for i in range(SIZE))]
    fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="[PAD]", unk_token="[UNK]"
    )


def texts() -> Any:
    """With columns that the model knows nothing of."""
    words = tokenizer()
    kinds = ["good", "bad"]
    text = [f"no{i} {kinds[i % 2]} " + "film " * (i % 4) for i in range(SIZE)]
    plain = datasets.Dataset.from_dict({
        "text": text,
        "label": [i % 2 for i in range(SIZE)],
        "source": ["web"] * SIZE,
    })
    return plain.map(lambda row: words(row["text"]))


def network() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=5 + SIZE,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    return transformers.BertForSequenceClassification(config)


class Recorder(transformers.Trainer):
    """Somebody's own Trainer; writes down which texts it trained on, in which order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shown: list[tuple[float, Tensor, Tensor, Tensor]] = []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        index, targets = inputs["input_ids"][:, 0] - 5, inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            logits = outputs["logits"].detach().clone()
            self.shown.append((self.state.epoch or 0.0, index, logits, targets))
        return (loss, outputs) if return_outputs else loss


class Tracked(TrackerMixin, Recorder):
    pass


def arguments(folder: Path, **more: Any) -> Any:
    options: dict[str, Any] = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(str(folder), **(options | more))


def trainer(folder: Path, kind: Any = Tracked, data: Any = None, **more: Any) -> Any:
    names = ("tracker", "logits", "targets", "correct", "group", "eval_dataset", "model")
    own = {k: more.pop(k) for k in (*names, "model_init", "callbacks") if k in more}
    if issubclass(kind, TrackerMixin):
        own.setdefault("tracker", DynamicsTracker(SIZE))
    return kind(
        model=None if "model_init" in own else own.pop("model", None) or network(),
        args=arguments(folder, **more),
        train_dataset=IndexedDataset(texts()) if data is None else data,
        data_collator=transformers.DataCollatorWithPadding(tokenizer()),
        **own,
    )


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"label_smoothing_factor": 0.1},
        {"eval_strategy": "epoch", "eval_dataset": texts},
        {"bf16": True},
        {"dataloader_num_workers": 1},
        {"group_by_length": True},
    ],
    ids=lambda more: next(iter(more), "plain"),
)
def test_train_presents_every_training_batch_and_nothing_else(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    if "eval_dataset" in more:
        more = {**more, "eval_dataset": texts()}
    if "group_by_length" in more and not hasattr(transformers.TrainingArguments, "group_by_length"):
        more = {"train_sampling_strategy": "group_by_length"}
    runner = trainer(tmp_path, **more)
    runner.train()
    tracker = runner.tracker
    assert tracker.presentations.unique().tolist() == [3]
    assert_same(tracker.state_dict(), in_one_process(SIZE, [runner.shown]), 0.0)
    assert tracker.columns()["target"].tolist() == [i % 2 for i in range(SIZE)]


def test_the_weights_are_those_of_a_training_without(tmp_path: Path) -> None:
    tracked = trainer(tmp_path)  # which seeds everything
    tracked.train()
    plain = trainer(tmp_path, Recorder, texts())
    plain.train()
    assert [i.tolist() for _, i, *_ in tracked.shown] == [i.tolist() for _, i, *_ in plain.shown]
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, tracked.model.state_dict()[name]), name


def test_a_column_of_ones_own_and_columns_kept(tmp_path: Path) -> None:
    """datasets.Dataset drops columns by another way; and with the dropping switched off."""
    column = texts().add_column("index", list(range(SIZE)))
    tokens = IndexedDataset(texts().remove_columns(["text", "source"]))
    for data, more in ((column, {}), (tokens, {"remove_unused_columns": False})):
        runner = trainer(tmp_path, TrackedTrainer, data, **more)
        runner.train()
        assert runner.tracker.presentations.unique().tolist() == [3]


def test_a_run_that_is_resumed_has_the_same_scores(tmp_path: Path) -> None:
    """From a checkpoint in the middle of the second epoch, and with the folder as a string."""
    whole = trainer(tmp_path / "whole")
    whole.train()
    options = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 2}
    first = trainer(tmp_path / "run", **options)

    class Power(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 10:
                raise KeyboardInterrupt

    first.add_callback(Power())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert sorted(p.name for p in (tmp_path / "run").glob("*/tracker.pt*")) == ["tracker.pt"] * 2
    for name, resume in (("last", True), ("named", str(tmp_path / "run" / "checkpoint-8"))):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        again = trainer(tmp_path / name, **options)
        again.train(resume_from_checkpoint=resume)
        assert len(again.shown) == 18 - 8
        assert_same(again.tracker.state_dict(), whole.tracker.state_dict(), 0.0)
        newest = torch.load(tmp_path / name / "checkpoint-18" / "tracker.pt")
        assert_same(newest, whole.tracker.state_dict(), 0.0)


def test_a_checkpoint_without_the_tracker_is_refused(tmp_path: Path) -> None:
    plain = trainer(tmp_path, Recorder, texts(), save_strategy="epoch", num_train_epochs=1)
    plain.train()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-6.*tracker\.pt"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_training_set_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="epoch", num_train_epochs=1).train()
    other = IndexedDataset(texts().select(range(20)))
    with pytest.raises(ValueError, match="`state_dict`.*20 samples"):
        trainer(tmp_path, data=other, tracker=DynamicsTracker(20)).train(True)


class OwnStep(transformers.Trainer):
    """Calls the model itself."""

    def training_step(self, model: Any, inputs: Any, *_: Any) -> Tensor:
        model.train()
        loss = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


class OtherFirst(OwnStep):
    """Another batch before: its logits are not this batch's."""

    def training_step(self, model: Any, inputs: Any, *args: Any) -> Tensor:
        model.train()
        model(input_ids=inputs["input_ids"].flip(0))
        return super().training_step(model, inputs, *args)


class NoisyFirst(OwnStep):
    """Other tokens before, with the batch's own mask and labels."""

    def training_step(self, model: Any, inputs: Any, *args: Any) -> Tensor:
        model.train()
        model(**{**inputs, "input_ids": inputs["input_ids"].flip(0)})
        return super().training_step(model, inputs, *args)


class NoisyFirstByPosition(OwnStep):
    def training_step(self, model: Any, inputs: Any, *_: Any) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        tokens, mask, labels = (inputs[n] for n in ("input_ids", "attention_mask", "labels"))
        model(tokens.flip(0), mask, labels=labels)
        loss = model(tokens, mask, labels=labels).loss
        self.accelerator.backward(loss)
        return loss.detach()


class LossAlone(transformers.Trainer):
    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        return model(**inputs).loss


class LossWithoutAChoice(transformers.Trainer):
    def compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        return model(**inputs).loss


class ByName(transformers.Trainer):
    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        *,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class Twice(transformers.Trainer):
    """FGM, AWP and SAM compute the loss twice in a step."""

    def training_step(self, model: Any, inputs: Any, *_: Any) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        self.accelerator.backward(self.compute_loss(model, inputs))
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


class InFrontStep(TrackedTrainer):
    def training_step(self, *args: Any) -> Tensor:
        return Twice.training_step(self, *args)


class InFrontLoss(TrackedTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return LossWithoutAChoice.compute_loss(self, *args, **kwargs)


class Silent(transformers.Trainer):
    """A step that no logits can be had from."""

    def training_step(self, model: Any, inputs: Any, *_: Any) -> Tensor:
        model.train()
        loss = model(**{name: value.clone() for name, value in inputs.items()}).loss
        self.accelerator.backward(loss)
        return loss.detach()


class SilentLoss(TrackedTrainer):
    """A loss whose logits nobody returns, on tensors of its own."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        return model(**{name: value.clone() for name, value in inputs.items()}).loss


class SharesLabels(TrackedTrainer):
    """Only mask and labels are the batch's."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        return model(**{**inputs, "input_ids": inputs["input_ids"].flip(0)}).loss


class Nothing(transformers.Trainer):
    """A step that does not call the model."""

    def training_step(self, model: Any, inputs: Any, *_: Any) -> Tensor:
        loss = sum(p.sum() * 0 for p in model.parameters())
        self.accelerator.backward(loss)
        return loss.detach()


class Strict(transformers.BertForSequenceClassification):
    """A forward that refuses what it does not name."""

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
        return super().forward(input_ids, attention_mask=attention_mask, labels=labels)


def tracked(own: Any) -> Any:
    return own if issubclass(own, TrackerMixin) else type("Mine", (TrackerMixin, own), {})


def model_s_own(batches: list[Any]) -> Any:
    """A network that writes down its first forward of each step in training mode."""

    def write(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        tokens = args[0] if args else kwargs["input_ids"]
        batches.append((tokens[:, 0] - 5, output.logits.detach().clone()))

    model = Strict(network().config)
    model.register_forward_hook(write, with_kwargs=True)
    return model


OWN = [OwnStep, LossAlone, LossWithoutAChoice, ByName, Twice, InFrontStep, InFrontLoss]
OTHER_FIRST = [OtherFirst, NoisyFirst, NoisyFirstByPosition]


@pytest.mark.parametrize("own", OWN + OTHER_FIRST)
def test_a_trainer_of_ones_own_is_counted_once_a_step(tmp_path: Path, own: Any) -> None:
    batches: list[Any] = []
    runner = trainer(tmp_path, tracked(own), model=model_s_own(batches), num_train_epochs=2)
    runner.train()
    assert runner.tracker.presentations.unique().tolist() == [2]
    if own in {Twice, InFrontStep}:
        batches = batches[::2]
    elif own in OTHER_FIRST:
        batches = batches[1::2]
    seen = [(step // 6, index, logits, index % 2) for step, (index, logits) in enumerate(batches)]
    assert_same(runner.tracker.state_dict(), in_one_process(SIZE, [seen]), 0.0)


def test_an_epoch_of_which_nothing_was_counted_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Mine.training_step"):
        trainer(tmp_path, tracked(Nothing)).train()


@pytest.mark.parametrize(
    ("own", "method"),
    [(Silent, "training_step"), (SilentLoss, "compute_loss"), (SharesLabels, "compute_loss")],
)
def test_a_batch_whose_logits_cannot_be_told_is_an_error_at_once(
    tmp_path: Path, own: Any, method: str
) -> None:
    runner = trainer(tmp_path, tracked(own))
    with pytest.raises(RuntimeError, match=f"`{tracked(own).__name__}.{method}`"):
        runner.train()
    assert runner.state.global_step == 0
    assert runner.tracker.presentations.sum() == 0


def halves() -> Any:
    tokens = texts().remove_columns(["text", "source"])
    parts = tokens.select(range(11)), tokens.select(range(11, SIZE))
    return torch.utils.data.ConcatDataset([IndexedDataset(part) for part in parts])


class OwnLoader(TrackedTrainer):
    def get_train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(halves(), 4, collate_fn=self.data_collator)


@pytest.mark.parametrize("kind", [TrackedTrainer, OwnLoader])
def test_samples_that_share_an_index_are_refused(tmp_path: Path, kind: Any) -> None:
    tokens = texts().remove_columns(["text", "source"])
    data = IndexedDataset(tokens) if kind is OwnLoader else halves()
    with pytest.raises(ValueError, match="ConcatDataset of 2 IndexedDatasets"):
        trainer(tmp_path, kind, data).train()
    whole = torch.utils.data.ConcatDataset([tokens.select(range(11)), tokens.select(range(11, 22))])
    runner = trainer(tmp_path, TrackedTrainer, IndexedDataset(whole), num_train_epochs=1)
    runner.train()
    assert runner.tracker.presentations.unique().tolist() == [1]


def part_of(data: Any) -> Any:
    return torch.utils.data.Subset(IndexedDataset(data), range(1, SIZE, 2))


def numbered(data: Any) -> Any:
    return data.add_column("index", list(range(SIZE)))


PARTS: dict[str, Any] = {
    "Subset": part_of,
    "select": lambda data: numbered(data).select(range(1, SIZE, 2)),
    "filter": lambda data: numbered(data).filter(lambda row: row["label"] == 1),
    "shuffle": lambda data: numbered(data).shuffle(seed=0).filter(lambda row: row["label"] == 1),
    "torch": lambda data: numbered(data).select(range(1, SIZE, 2)).with_format("torch"),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_keeps_the_numbers_of_the_whole(tmp_path: Path, name: str) -> None:
    data = texts().remove_columns(["text", "source"])
    runner = trainer(tmp_path, TrackedTrainer, PARTS[name](data), num_train_epochs=2)
    runner.train()
    assert runner.tracker.presentations.tolist() == [0, 2] * (SIZE // 2)


def test_a_column_of_other_numbers_is_refused(tmp_path: Path) -> None:
    once = numbered(texts())
    twice, part = datasets.concatenate_datasets([once, once]), part_of(texts())
    with pytest.raises(ValueError, match="`index`.*0 2 times"):
        trainer(tmp_path, data=twice, tracker=ForgettingTracker(2 * SIZE))
    with pytest.raises(ValueError, match=r"`index`.*\[0, 12\).*21"):
        trainer(tmp_path, data=once.select(range(10, SIZE)), tracker=ForgettingTracker(12))
    with pytest.raises(ValueError, match="`tracker`.*22 samples.*11"):
        trainer(tmp_path, data=part, tracker=ForgettingTracker(len(part)))


def test_evaluation_on_an_indexed_set_needs_no_index_in_the_model(tmp_path: Path) -> None:
    data = IndexedDataset(texts().remove_columns(["text", "source"]))
    model = Strict(network().config)
    runner = trainer(tmp_path, TrackedTrainer, data, model=model, eval_dataset=data)
    runner.evaluate()
    assert (
        runner.predict(IndexedDataset(texts().remove_columns("label"))).predictions.shape[0] == SIZE
    )
    assert runner.tracker.presentations.sum() == 0


def next_tokens_right(batch: Any, outputs: Any) -> Tensor:
    wanted = batch["labels"][:, 1:]
    return ((outputs.logits[:, :-1].argmax(-1) == wanted) | (wanted == -100)).all(1)


TASKS: dict[str, tuple[Any, Any, Any]] = {
    "token classification": (
        transformers.BertForTokenClassification,
        [1, 0, 1, 0],
        lambda batch, outputs: (outputs.logits.argmax(-1) == batch["labels"]).all(1),
    ),
    "causal language model": (transformers.BertLMHeadModel, [5, 6, -100, 7], next_tokens_right),
    "multi-label": (
        transformers.BertForSequenceClassification,
        [1.0, 0.0],
        lambda batch, outputs: ((outputs.logits > 0) == batch["labels"].bool()).all(1),
    ),
    "regression": (
        transformers.BertForSequenceClassification,
        0.5,
        lambda batch, outputs: (outputs.logits[:, 0] - batch["labels"]).abs() < 0.1,
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_any_other_task_by_a_judgement_of_ones_own(tmp_path: Path, name: str) -> None:
    kind, labels, correct = TASKS[name]
    config = network().config
    config.is_decoder = True
    config.num_labels = 1 if name == "regression" else 2
    samples = [{"input_ids": [5 + i, 2, 3, 4], "labels": labels} for i in range(SIZE)]
    judged: list[tuple[Tensor, Tensor]] = []

    def judge(batch: Any, outputs: Any) -> Tensor:
        judged.append((batch["input_ids"][:, 0] - 5, correct(batch, outputs)))
        return judged[-1][1]

    options = {"kind": tracked(Collated), "data": IndexedDataset(samples), "model": kind(config)}
    tracker = ForgettingTracker(SIZE)
    trainer(tmp_path, tracker=tracker, correct=judge, num_train_epochs=2, **options).train()
    wanted = ForgettingTracker(SIZE)
    for index, right in judged:
        wanted.update_correct(index, right)
    assert_same(tracker.state_dict(), wanted.state_dict(), 0.0)
    with pytest.raises((TypeError, ValueError), match="`targets`.*`TrackedTrainer.*correct="):
        trainer(tmp_path, tracker=ForgettingTracker(SIZE), **options).train()


class Collated(transformers.Trainer):
    """Samples of one length need no padding, nor do their labels."""

    def __init__(self, *args: Any, data_collator: Any, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=transformers.default_data_collator, **kwargs)


def test_targets_by_another_name(tmp_path: Path) -> None:
    data = IndexedDataset(texts().remove_columns(["text", "source"]))
    runner = trainer(tmp_path, TrackedTrainer, data, targets=lambda batch: 1 - batch["labels"])
    runner.train()
    assert runner.tracker.columns()["target"].tolist() == [1 - i % 2 for i in range(SIZE)]


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", num_train_epochs=2)
    whole.train()
    options = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 2}
    trainer(tmp_path / "run", **options).train()
    (tmp_path / "run" / "checkpoint-12" / "tracker.pt").unlink()  # written by an older version
    killed = {  # at some instant of writing checkpoint-8
        "as the Trainer begins": lambda last: [p.unlink() for p in last.iterdir()],
        "before the Trainer": lambda last: [
            p.unlink() for p in last.iterdir() if p.suffix != ".pt"
        ],
        "before the tracker": lambda last: (last / "tracker.pt").rename(last / "tracker.pt.part"),
        "at the end": lambda last: (last / "trainer_state.json").write_text('{"epoch": 1.'),
    }
    for name, kill in killed.items():
        shutil.copytree(tmp_path / "run", tmp_path / name)
        kill(tmp_path / name / "checkpoint-8")
        again = trainer(tmp_path / name, **options)
        with pytest.warns(UserWarning, match="checkpoint-12.*checkpoint-4"):
            again.train(resume_from_checkpoint=True)
        assert len(again.shown) == 12 - 4, name
        assert_same(again.tracker.state_dict(), whole.tracker.state_dict(), 0.0)


class Killed(transformers.TrainerCallback):
    """Before anybody else hears that a checkpoint was saved."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 8:
            raise KeyboardInterrupt


def test_the_tracker_is_in_a_checkpoint_before_it_is_whole(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 2}
    runner = trainer(tmp_path, **options)
    runner.callback_handler.callbacks.insert(0, Killed())
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    again = trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert len(again.shown) == 12 - 8
    assert again.tracker.presentations.unique().tolist() == [2]


class Trial(dict[str, Any]):
    """What the Trainer asks of a trial of optuna's."""

    def __init__(self, number: int) -> None:
        super().__init__(learning_rate=0.01 / number)
        self.number, self.params = number, dict(self)


def test_trials_of_a_search_are_not_pooled(tmp_path: Path, monkeypatch: Any) -> None:
    """As `hyperparameter_search` calls it, without the package that it needs."""
    for name in ("trainer", "integrations"):  # they know optuna's own trials only
        module = importlib.import_module(f"transformers.{name}")
        monkeypatch.setattr(module, "hp_params", dict, raising=False)
    runner = trainer(tmp_path, model_init=network, save_strategy="epoch", num_train_epochs=2)
    runner.hp_search_backend, runner.hp_name = "optuna", None
    runner.hp_space = dict
    for number in (1, 2):
        runner.train(trial=Trial(number))
        saved = torch.load(tmp_path / f"run-{number}" / "checkpoint-12" / "tracker.pt")
        assert_same(saved, runner.tracker.state_dict(), 0.0)
    last = [(step // 6, *shown[1:]) for step, shown in enumerate(runner.shown[12:])]
    assert_same(runner.tracker.state_dict(), in_one_process(SIZE, [last]), 0.0)
    runner.hp_search_backend = None
    runner.train()  # the best trial's settings, once more
    assert runner.tracker.presentations.unique().tolist() == [2]


class OutOfMemory(transformers.TrainerCallback):
    steps = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1
        if self.steps == 3:
            raise RuntimeError("CUDA out of memory.")


def test_an_attempt_that_ran_out_of_memory_is_not_counted(tmp_path: Path) -> None:
    options: dict[str, Any] = {"auto_find_batch_size": True, "num_train_epochs": 2}
    runner = trainer(tmp_path, callbacks=[OutOfMemory()], per_device_train_batch_size=8, **options)
    runner.train()
    assert len({len(shown[1]) for shown in runner.shown}) > 1, "two batch sizes were tried"
    assert runner.tracker.presentations.unique().tolist() == [2]


def test_ranks_that_share_batches_need_a_group(tmp_path: Path) -> None:
    class Parallel(TrackedTrainer):
        def get_cp_size(self) -> int:
            return 2

    data = IndexedDataset(texts().remove_columns(["text", "source"]))
    with pytest.raises(ValueError, match="`group`.*'cp': 2"):
        trainer(tmp_path, Parallel, data).train()


def test_what_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`tracker`.*22 samples.*20"):
        trainer(tmp_path, tracker=ForgettingTracker(20))
    with pytest.raises(TypeError, match="`tracker`.*NoneType"):
        trainer(tmp_path, tracker=None)
    with pytest.raises(TypeError, match="`index` and `labels`.*IndexedDataset"):
        trainer(tmp_path, data=texts()).train()


class Named(transformers.BertForSequenceClassification):
    def forward(self, **kwargs: Any) -> Any:
        outputs = super().forward(**kwargs)
        return {"loss": outputs.loss, "answers": outputs.logits}


def test_a_model_without_logits_is_an_error_unless_one_says_how(tmp_path: Path) -> None:
    data = IndexedDataset(texts().remove_columns(["text", "source"]))
    options: dict[str, Any] = {"kind": TrackedTrainer, "data": data}
    options |= {"model": Named(network().config), "remove_unused_columns": False}
    with pytest.raises(TypeError, match="keys loss, answers from Named.*logits=lambda outputs"):
        trainer(tmp_path, **options).train()
    runner = trainer(tmp_path, logits=lambda outputs: outputs["answers"], **options)
    runner.train()
    assert runner.tracker.presentations.unique().tolist() == [3]


def test_two_processes(tmp_path: Path) -> None:
    processes.ranks(2, main, tmp_path, folder=tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert sum(len(index) for rank in ranks for _, index, *_ in rank["shown"]) >= 3 * SIZE
    expected = in_one_process(SIZE, [rank["shown"] for rank in ranks])
    for rank in ranks:
        assert_same(rank["tracker"], expected, 1e-5)
        assert_same(rank["checkpoint"], rank["tracker"], 0.0)
        assert_same(rank["alone"], in_one_process(SIZE, [rank["alone shown"]]), 0.0)


def main(folder: Path) -> None:
    """What a rank does in `test_two_processes`."""
    runner = trainer(folder, save_strategy="steps", save_steps=9)  # at the end alone
    runner.train()
    found = {
        "shown": runner.shown,
        "tracker": runner.tracker.state_dict(),
        "checkpoint": torch.load(folder / "checkpoint-9" / "tracker.pt", weights_only=True),
    }
    rank = runner.args.process_index
    groups = [torch.distributed.new_group([member]) for member in range(2)]
    runner = trainer(folder, group=lambda _: groups[rank], num_train_epochs=1)
    runner.train()
    found |= {"alone": runner.tracker.state_dict(), "alone shown": runner.shown}
    torch.save(found, folder / f"{rank}.pt")
