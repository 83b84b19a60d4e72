"""The tracker in a real Trainer, with a tiny text classifier made here."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import torchrun
from test_sync import assert_same, in_one_process
from torch import Tensor

from drophot import DynamicsTracker, ForgettingTracker, IndexedDataset

transformers = pytest.importorskip("transformers", reason="`transformers` is not installed")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
from drophot.integrations.transformers import (  # noqa: E402 - only where it is there
    TrackedTrainer,
    TrackerMixin,
)

pytestmark = [  # of its own, or of old versions of it
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
    own = {k: more.pop(k) for k in ("tracker", "logits", "eval_dataset", "model") if k in more}
    if issubclass(kind, TrackerMixin):
        own.setdefault("tracker", DynamicsTracker(SIZE))
    return kind(
        model=own.pop("model", None) or network(),
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
    with pytest.raises(FileNotFoundError, match=r"checkpoint-6 should have .* no tracker\.pt"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_training_set_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="epoch", num_train_epochs=1).train()
    other = IndexedDataset(texts().select(range(20)))
    with pytest.raises(ValueError, match="should hold 20 samples"):
        trainer(tmp_path, data=other, tracker=DynamicsTracker(20)).train(True)


def test_what_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="22 samples. Found one of 20"):
        trainer(tmp_path, tracker=ForgettingTracker(20))
    with pytest.raises(TypeError, match="Found NoneType"):
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
    torchrun(2, __file__, str(tmp_path), folder=tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert sum(len(index) for rank in ranks for _, index, *_ in rank["shown"]) >= 3 * SIZE
    expected = in_one_process(SIZE, [rank["shown"] for rank in ranks])
    for rank in ranks:
        assert_same(rank["tracker"], expected, 1e-5)
        assert_same(rank["checkpoint"], rank["tracker"], 0.0)


def main(folder: Path) -> None:
    """What a rank does in `test_two_processes`."""
    runner = trainer(folder, save_strategy="steps", save_steps=9)  # at the end alone
    runner.train()
    found = {
        "shown": runner.shown,
        "tracker": runner.tracker.state_dict(),
        "checkpoint": torch.load(folder / "checkpoint-9" / "tracker.pt", weights_only=True),
    }
    torch.save(found, folder / f"{runner.args.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
