"""The recipe of `examples/resnet_cifar.py --recipe`, compared with plain training on CIFAR-10.

For each seed, a narrow ResNet of three residual blocks trains on a part of the training set twice,
from the same weights and for the same steps: with SGD at a constant learning rate, and with the
whole recipe. Each row is kept in a file with its settings, so the same command resumes after being
stopped, and a command with other settings trains again. Only rows of the command's settings are
written to the results. `--data` names a folder of images, as for little_data.py.
"""

import json
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path

import torch
from common import save
from little_data import Recipe, network, read
from torch.optim import SGD

from drophot import evaluate, fit


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of train/ and test/")
    parser.add_argument("--train-each", type=int, default=500, help="images of each class")
    parser.add_argument("--test-each", type=int, default=200)
    parser.add_argument("--width", type=int, default=16, help="channels of the first block")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1, help="highest learning rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--store", type=Path, default=Path("recipe"), help="folder of results")
    options = parser.parse_args()
    options.store.mkdir(parents=True, exist_ok=True)
    train_set, num_classes = read(options.data / "train", options.train_each)
    test_set, _ = read(options.data / "test", options.test_each)
    path = options.store / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    names = ("epochs", "width", "lr", "batch_size")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"train_images": len(train_set), "test_images": len(test_set)}
    for seed in options.seeds:
        for training in ("plain", "recipe"):
            row = {"seed": seed, "training": training, **settings}
            if any(row.items() <= one.items() for one in rows):
                continue
            torch.manual_seed(seed)
            model = network(num_classes, augmented=training == "recipe", width=options.width)
            model = model.to(options.device)
            optimizer = SGD(
                model.parameters(), options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
            )
            loop = Recipe(options.lr) if training == "recipe" else fit
            how = {"optimizer": optimizer, "batch_size": options.batch_size, "seed": seed}
            loop(model, train_set, options.epochs, **how)
            row |= {
                f"{part}_accuracy": evaluate(model, data)
                for part, data in (("train", train_set), ("test", test_set))
            }
            rows.append(row)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    save(
        "recipe",
        torch.device(options.device),
        [one for one in rows if settings.items() <= one.items()],
    )


if __name__ == "__main__":
    main()
