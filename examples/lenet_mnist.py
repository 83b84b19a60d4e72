"""Train, select, prune and fine-tune LeNet on MNIST or a folder of images.

This is a plain PyTorch training script: its own loop, augmentation, mixed precision, a learning
rate schedule, gradient clipping and checkpoints. The lines marked with "drophot:" are all that
drophot adds, and the loop over the batches does not change at all: `watch` removes the index from
each batch, and `attach` reads the logits. The script trains three times:

    score      LeNet on all samples, while drophot counts how often each of them is forgotten
    train      a new LeNet on the coreset, by default the fifth that was forgotten most often
    finetune   the same LeNet, without 80 % of its weights, on all samples again

    python examples/lenet_mnist.py --download
    python examples/lenet_mnist.py --data folder --data-root images
    python examples/lenet_mnist.py --smoke

A folder has the images train/CLASS/*.png and test/CLASS/*.png (or .jpg), which are converted to
gray and 28x28 pixels. --smoke trains on a few generated images with random labels, to see that
everything runs. After being stopped or killed, the same command resumes after the last finished
epoch. To find out whether the scores help, compare with --mode random and another --out.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import MNIST, FakeData, ImageFolder

from drophot import ForgettingTracker, IndexedDataset, magnitude_prune, select, summary
from drophot.prune import save_compressed

parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
parser.add_argument("--data", default="mnist", choices=["mnist", "folder"])
parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of the data")
parser.add_argument("--download", action="store_true", help="download MNIST if it is missing")
parser.add_argument("--epochs", type=int, default=10, help="epochs of each of the three trainings")
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the first epoch")
parser.add_argument("--data-ratio", type=float, default=0.2, help="share of samples kept")
parser.add_argument("--mode", default="high", choices=["high", "low", "random"])
parser.add_argument("--prune-ratio", type=float, default=0.8, help="share of weights removed")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
parser.add_argument("--amp", action="store_true", help="autocast; slow on CPUs without bfloat16")
parser.add_argument("--workers", type=int, default=2, help="processes that load images")
parser.add_argument("--out", type=Path, default=Path("lenet_mnist"), help="folder of checkpoints")
parser.add_argument("--smoke", action="store_true", help="a quick test on generated images")


def main():
    args = parser.parse_args()
    if args.smoke:
        args.batch_size, args.epochs, args.workers = 32, 3, 0
    try:
        train_set, test_set, num_classes = read_data(args)
    except (FileNotFoundError, RuntimeError) as error:
        fix = "Choose another --data-root." if args.data == "folder" else "Add --download."
        parser.error(f"found no {args.data} in {args.data_root} ({error}). {fix}")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    batches = partial(DataLoader, batch_size=args.batch_size, num_workers=args.workers)

    indexed = IndexedDataset(train_set)  # drophot: (image, label) becomes (image, label, index)
    tracker = ForgettingTracker(len(indexed))  # drophot: track
    watched = tracker.watch(batches(indexed, shuffle=True))  # drophot: (image, label) again
    test = batches(test_set)
    baseline = lenet(num_classes).to(args.device)
    with tracker.attach(baseline):  # drophot: read the logits
        everything = train("score", baseline, watched, test, args, tracker=tracker)

    # drophot: select
    indices = select(tracker.scores(), args.data_ratio, args.mode, seed=args.seed)
    coreset = Subset(train_set, indices.tolist())  # drophot: an ordinary dataset to train on
    model = lenet(num_classes).to(args.device)
    trained = train("train", model, batches(coreset, shuffle=True), test, args)

    masks = magnitude_prune(model, args.prune_ratio)  # drophot: prune
    pruned = accuracy(model, test, args)
    finetuned = train("finetune", model, batches(train_set, shuffle=True), test, args, masks=masks)

    save_compressed(model, args.out / "model.drophot")  # drophot: a file without the zeros
    print(summary(model))  # drophot: layer by layer
    print(f"\n{len(coreset):,} of {len(indexed):,} samples kept, mode {args.mode}. {masks}")
    print(f"trained on all samples   {everything:7.2%}")
    print(f"trained on the coreset   {trained:7.2%}")
    print(f"pruned                   {pruned:7.2%}")
    print(f"fine-tuned               {finetuned:7.2%}")


def train(stage, model, loader, test, args, tracker=None, masks=None):
    """Train a model, or resume its training, and return the test accuracy after the last epoch."""
    optimizer = AdamW(model.parameters(), args.lr)
    scheduler = CosineAnnealingLR(optimizer, args.epochs)
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp and args.device == "cuda")
    stateful = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    if tracker is not None:
        stateful["tracker"] = tracker  # drophot: its state is a part of the checkpoint

    epochs, test_accuracy = 0, 0.0
    compared = vars(args).keys() - {"data_root", "download", "device", "workers", "out"}
    settings = {name: getattr(args, name) for name in compared}
    checkpoint = args.out / f"{stage}.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if saved["settings"] != settings:
            parser.error(f"{checkpoint} is of a run with other settings. Choose another --out.")
        for name, part in stateful.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])  # shuffling and augmentation draw from these
        if args.device == "cuda":
            torch.cuda.set_rng_state(saved["cuda_rng"])
        epochs, test_accuracy = saved["epochs"], saved["accuracy"]

    with nullcontext() if masks is None else masks.hold(optimizer):  # drophot: zeros stay zero
        for epoch in range(epochs, args.epochs):
            model.train()
            for images, labels in loader:
                images, labels = images.to(args.device), labels.to(args.device)
                with autocast(args):
                    loss = nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
            scheduler.step()
            test_accuracy = accuracy(model, test, args)
            done = f"epoch {epoch + 1}/{args.epochs}"
            print(f"{stage:8}  {done:12}  test {test_accuracy:7.2%}", flush=True)

            saved = {name: part.state_dict() for name, part in stateful.items()}
            saved |= {"epochs": epoch + 1, "accuracy": test_accuracy, "settings": settings}
            saved["rng"] = torch.get_rng_state()
            if args.device == "cuda":
                saved["cuda_rng"] = torch.cuda.get_rng_state()
            torch.save(saved, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)  # never half a checkpoint
    return test_accuracy


@torch.no_grad()
def accuracy(model, test, args):
    model.eval()
    correct = total = 0
    for images, labels in test:
        with autocast(args):
            predictions = model(images.to(args.device)).argmax(1)
        correct += (predictions == labels.to(args.device)).sum().item()
        total += len(labels)
    return correct / total


def lenet(num_classes):
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 120), nn.ReLU()),
        *(nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_classes)),
    )


def autocast(args):
    dtype = torch.float16 if args.device == "cuda" else torch.bfloat16
    return torch.autocast(args.device, dtype, enabled=args.amp)


def read_data(args):
    root, normalize = args.data_root, transforms.Normalize(0.1307, 0.3081)
    plain = transforms.Compose([
        transforms.Grayscale(),
        transforms.Resize((28, 28)),
        transforms.ToTensor(),
        normalize,
    ])
    shift = transforms.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.9, 1.1))
    augment = transforms.Compose([shift, plain])
    if args.smoke:
        shape = (1, 28, 28)
        return FakeData(256, shape, transform=augment), FakeData(64, shape, transform=plain), 10
    if args.data == "folder":
        train_set = ImageFolder(root / "train", augment)
        return train_set, ImageFolder(root / "test", plain), len(train_set.classes)
    train_set = MNIST(root, train=True, transform=augment, download=args.download)
    test_set = MNIST(root, train=False, transform=plain, download=args.download)
    return train_set, test_set, len(train_set.classes)


if __name__ == "__main__":
    main()
