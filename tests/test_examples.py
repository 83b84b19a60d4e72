"""The examples, run as a person runs them, on little data."""

import os
import re
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers.processes import begin, run_script, run_script_on_ranks

from drophot import Masks
from drophot.prune import load_compressed

pytestmark = pytest.mark.slow
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def run(name: str, *arguments: str, folder: Path) -> str:
    script = ROOT / "examples" / name
    return run_script(script, *arguments, folder=folder, filters=["error::UserWarning"])


Stops = Callable[..., tuple[int | str | None, str]]


def first_digits(mnist_root: Path, root: Path, train: int, test: int) -> Path:
    """The first images of MNIST, in the format of its files."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        for kind, header, size in (("images-idx3", 16, 28 * 28), ("labels-idx1", 8, 1)):
            name = f"{part}-{kind}-ubyte"
            whole = (mnist_root / "MNIST" / "raw" / name).read_bytes()
            few = count.to_bytes(4, "big")  # the number of images follows the first four bytes
            (raw / name).write_bytes(whole[:4] + few + whole[8 : header + count * size])
    return root


@pytest.fixture(scope="module")
def few_digits(mnist_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return first_digits(mnist_root, tmp_path_factory.mktemp("data"), 12_000, 2_000)


@pytest.fixture
def stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Stops:
    """An example that stops before its work, in this process: how, and what it says."""

    def stops(name: str, *arguments: str) -> tuple[int | str | None, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        printed = capsys.readouterr()
        return end.value.code, printed.out + printed.err

    return stops


def rows(output: str) -> list[list[str]]:
    found = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in output.splitlines()
        if line.startswith("| ")
    ]
    return found[2:]


def test_the_examples_are_there() -> None:
    assert EXAMPLES == [
        "ddp.py",
        "find_mislabeled.py",
        "lenet_mnist.py",
        "noisy_labels.py",
        "paper_grid.py",
        "quickstart.py",
        "resnet_cifar.py",
        "text_losses.py",
        "your_own_loop.py",
    ]


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_has_help_and_a_device(name: str, stops: Stops) -> None:
    pytest.importorskip("torchvision")
    code, output = stops(name, "--help")
    assert code == 0
    assert "--device" in output
    assert len(output) > 400


def test_quickstart(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    output = run("quickstart.py", "--seeds", "2", "--epochs", "3", folder=tmp_path)
    assert re.search(r"about \d+ seconds", output.splitlines()[0])
    found = rows(output)
    assert [row[1] for row in found] == ["high", "low", "random", "baseline"]
    assert [row[3] for row in found] == ["287", "287", "287", "1,437"]
    assert {row[5] for row in found} == {"2"}
    assert {row[9] for row in found} == {"80.00"}
    assert all(float(row[8].split()[0]) > 80 for row in found), "it has learned"
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000


def test_your_own_loop(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    output = run("your_own_loop.py", "--epochs", "5", folder=tmp_path)
    assert re.search(r"zeros\D+0\.80", output)
    assert float(re.findall(r"fine-tuned\D+([\d.]+)", output)[0]) > 90


def test_text_losses_find_the_scrambled_sentences(tmp_path: Path) -> None:
    output = run("text_losses.py", "--epochs", "3", folder=tmp_path)
    aurocs = dict(re.findall(r"^(\w+) +([\d.]+)$", output, re.M))
    assert list(aurocs) == ["loss", "last_loss", "loss_average"]
    assert all(float(value) > 0.9 for value in aurocs.values()), "by chance it would be 0.5"


def test_ddp_in_two_processes_and_in_one(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    script = ROOT / "examples" / "ddp.py"
    filters = ["error::UserWarning"]
    two = run_script_on_ranks(2, script, "--epochs", "3", folder=tmp_path, filters=filters)
    one = run("ddp.py", "--epochs", "3", folder=tmp_path)
    assert two.startswith("2 processes, 3 epochs of 1,797 samples: 5,394 presentations")
    assert one.startswith("1 processes, 3 epochs of 1,797 samples: 5,391 presentations")
    assert "539 samples kept, the same on every process" in two


def test_find_mislabeled_on_real_images(tmp_path: Path, few_digits: Path) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("sklearn")
    output = run("find_mislabeled.py", "--data-root", str(few_digits), folder=tmp_path)
    scores = dict(re.findall(r"^(.+?) {2,}(0\.\d{4})$", output, re.M))
    assert len(scores) == 7
    assert max(map(float, scores.values())) >= 0.98
    assert float(scores["aum"]) >= 0.98
    assert float(scores["el2n"]) >= 0.98
    assert float(scores["forgetting counts"]) < 0.6, "which is why AUM is there"
    assert (tmp_path / "find_mislabeled.png").stat().st_size > 10_000


def test_noisy_labels_on_real_images(tmp_path: Path, few_digits: Path) -> None:
    pytest.importorskip("torchvision")
    arguments = ("--data-root", str(few_digits), "--epochs", "1", "--seeds", "0", "--noise", "0.4")
    output = run("noisy_labels.py", *arguments, folder=tmp_path)
    (caught,) = re.findall(r"^seed 0: ([\d.]+)% of the flipped samples", output, re.M)
    assert float(caught) > 80, "by chance it would be 40"
    found = {row[0]: [float(cell) for cell in row[2:]] for row in rows(output)}
    assert list(found) == [
        "everything",
        "lowest AUM dropped",
        "dropped in training only",
        "random share dropped",
        "right labels only",
    ]
    for name in ("lowest AUM dropped", "right labels only"):
        assert found[name][0] > found["random share dropped"][0]
    assert found["right labels only"][2] > found["dropped in training only"][2], "they are back"


def test_paper_grid_on_real_images(tmp_path: Path, mnist_root: Path) -> None:
    pytest.importorskip("torchvision")
    root = first_digits(mnist_root, tmp_path / "data", 5_000, 1_000)
    arguments = (
        *("--data-root", str(root), "--epochs", "1", "--jobs", "2", "--seeds", "0"),
        *("--data-ratios", "0.2", "--modes", "low", "random", "--prune-ratios", "0.8"),
    )
    plan = run("paper_grid.py", *arguments, "--plan", folder=tmp_path)
    assert plan.startswith("7 stages to do for 4 of 4 runs (1 scorings, 2 trainings")
    assert not (tmp_path / "paper_grid").exists()
    output = run("paper_grid.py", *arguments, folder=tmp_path)
    found = rows(output)
    assert [row[1] for row in found] == ["baseline", "baseline", "low", "random"]
    assert [row[3] for row in found] == ["5,000", "5,000", "1,000", "1,000"]
    assert all(float(row[8].split()[0]) > 70 for row in found), "it has learned"
    assert (tmp_path / "paper_grid" / "records.jsonl").read_text().count("\n") == 4
    assert "<svg" in (tmp_path / "paper_grid" / "report.html").read_text()
    assert run("paper_grid.py", *arguments, folder=tmp_path) == output, "nothing left to do"


def test_paper_grid_with_a_resnet_on_a_folder_of_images(tmp_path: Path) -> None:
    """Small images made here, in folders named after their classes, as PNG files."""
    pytest.importorskip("torchvision")
    import numpy as np
    from PIL import Image

    chance = np.random.default_rng(0)
    for part, size in (("train", 6), ("test", 2)):
        for label, colour in enumerate(("red", "green", "blue")):
            folder = tmp_path / "images" / part / colour
            folder.mkdir(parents=True)
            for i in range(size):
                pixels = chance.integers(0, 90, (8, 8, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    images = ("--data", "folder", "--data-root", str(tmp_path / "images"), "--model", "resnet18")
    output = run(
        "paper_grid.py",
        *(*images, "--epochs", "1", "--seeds", "0", "--jobs", "1"),
        *("--data-ratios", "0.5", "--modes", "low", "--prune-ratios", "0.8"),
        folder=tmp_path,
    )
    found = rows(output)
    assert [row[1] for row in found] == ["baseline", "baseline", "low"]
    assert [row[3] for row in found] == ["18", "18", "9"]
    assert [row[9] for row in found] == ["0.00", "80.00", "80.00"]


def test_paper_grid_refuses_images_that_a_network_does_not_take(stops: Stops) -> None:
    pytest.importorskip("torchvision")
    for wrong in (("--model", "lenet", "--data", "cifar10"), ("--model", "resnet18")):
        code, said = stops("paper_grid.py", *wrong)
        assert code == 2
        assert f"--model {wrong[1]} cannot be trained on --data" in said


def run_until_checkpoint(script: str, arguments: tuple[str, ...], checkpoints: int) -> None:
    """Run a script, and kill its process right after it has written so many checkpoints."""
    replace, written = Path.replace, 0

    def replace_and_die(source: Path, target: Path) -> Path:
        nonlocal written
        result = replace(source, target)
        written += source.suffix == ".part"
        if written == checkpoints:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Path.replace = replace_and_die  # type: ignore[method-assign]
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def is_same(one: object, other: object) -> bool:
    """Whether two states are equal, bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return one == other


@pytest.mark.parametrize(
    ("name", "arguments", "kills"),
    [
        ("lenet_mnist.py", ("--smoke", "--amp"), (1, 3, 3)),
        ("resnet_cifar.py", ("--smoke",), (3,)),
    ],
)
def test_a_training_that_is_killed_and_resumed_ends_in_the_same_weights(
    name: str, arguments: tuple[str, ...], kills: tuple[int, ...], tmp_path: Path
) -> None:
    pytest.importorskip("torchvision")
    output = run(name, *arguments, "--out", "whole", folder=tmp_path)
    assert re.search(r"removed, sparsity 0\.8000", output)
    resumed = (*arguments, "--out", "resumed")
    for checkpoints in kills:
        script, log = str(ROOT / "examples" / name), tmp_path / "killed"
        process = begin(
            run_until_checkpoint, script, resumed, checkpoints, folder=tmp_path, output=log
        )
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()
    rest = run(name, *resumed, folder=tmp_path)
    assert len(re.findall("epoch", rest)) == len(re.findall("epoch", output)) - sum(kills)
    assert rest.partition("\nlayer")[2] == output.partition("\nlayer")[2], "summary and accuracies"
    for stage in ("score", "train", "finetune"):
        whole, again = (
            torch.load(tmp_path / out / f"{stage}.pt", weights_only=True)
            for out in ("whole", "resumed")
        )
        assert ("tracker" in whole) == (stage == "score")
        assert whole.keys() >= {"model", "optimizer", "scheduler", "scaler", "rng"}
        assert is_same(again, whole)
    for out in ("whole", "resumed"):
        shutil.rmtree(tmp_path / out)  # 270 MB of a ResNet


def test_lenet_learns_a_folder_of_images(tmp_path: Path, stops: Stops) -> None:
    """Horizontal, vertical and no stripes, and what the compressed file has of the network."""
    pytest.importorskip("torchvision")
    import numpy as np
    from PIL import Image

    chance = np.random.default_rng(0)
    stripes = np.arange(28) // 4 % 2 * np.full((28, 28), 150)
    for part, size in (("train", 24), ("test", 8)):
        for label, pattern in enumerate((stripes, stripes.T, 0 * stripes)):
            folder = tmp_path / "images" / part / str(label)
            folder.mkdir(parents=True)
            for i in range(size):
                pixels = pattern + chance.integers(0, 100, (28, 28))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    arguments = ("--data", "folder", "--data-root", str(tmp_path / "images"), "--workers", "0")
    options = ("--epochs", "8", "--batch-size", "12", "--lr", "0.003", "--data-ratio", "0.5")
    output = run("lenet_mnist.py", *arguments, *options, folder=tmp_path)
    assert "36 of 72 samples kept, mode high" in output
    accuracies = re.findall(r"^(trained|fine-tuned).* ([\d.]+)%$", output, re.M)
    assert len(accuracies) == 3
    assert all(float(accuracy) > 80 for _, accuracy in accuracies), "it has learned"

    model = runpy.run_path(str(ROOT / "examples" / "lenet_mnist.py"))["lenet"](3)
    load_compressed(model, tmp_path / "lenet_mnist" / "model.drophot")
    assert round(Masks.from_zeros(model).sparsity, 3) == 0.8
    code, said = stops("lenet_mnist.py", *arguments, *options, "--mode", "low")
    assert code == 2
    assert "score.pt is of a run with other settings" in said


@pytest.mark.parametrize(
    ("name", "arguments", "cure"),
    [
        ("find_mislabeled.py", (), "--download"),
        ("lenet_mnist.py", (), "--download"),
        ("lenet_mnist.py", ("--data", "folder"), "another --data-root"),
        ("resnet_cifar.py", (), "--download"),
        ("resnet_cifar.py", ("--data", "cifar100"), "--download"),
        ("resnet_cifar.py", ("--data", "folder"), "another --data-root"),
        ("noisy_labels.py", (), "--download"),
        ("paper_grid.py", (), "--download"),
        ("paper_grid.py", ("--model", "resnet18", "--data", "cifar100"), "--download"),
        ("paper_grid.py", ("--model", "resnet18", "--data", "folder"), "another --data-root"),
    ],
)
def test_data_that_is_not_there_is_named(
    name: str, arguments: tuple[str, ...], cure: str, stops: Stops
) -> None:
    pytest.importorskip("torchvision")
    code, said = stops(name, "--data-root", "nowhere", *arguments)
    assert code == 2
    assert "nowhere" in said
    assert cure in said
