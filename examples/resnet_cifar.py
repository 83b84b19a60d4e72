"""Train, select, prune and fine-tune a ResNet on CIFAR-10, CIFAR-100 or a folder of images.

This is a plain PyTorch training script: its own loop, augmentation, mixed precision, a learning
rate schedule, gradient clipping and checkpoints. The lines marked with "drophot:" are all that
drophot adds. The script trains three times:

    score      a ResNet on all samples, which counts how often each of them is forgotten
    train      a new ResNet on the coreset, by default the half that was forgotten most often
    finetune   the same ResNet, without 80 % of its weights, on all samples again

    python examples/resnet_cifar.py --download --device cuda --amp
    python examples/resnet_cifar.py --download --device cuda --recipe --batch-size 512 --lr 0.4
    python examples/resnet_cifar.py --data folder --data-root images --image-size 64
    python examples/resnet_cifar.py --smoke

A folder has the images train/CLASS/*.jpg and test/CLASS/*.jpg (or .png), of any size. --smoke
trains on a few generated images with random labels, to see that everything runs. After being
stopped or killed, the same command resumes after the last finished epoch. To find out whether the
scores help, compare with --mode random and another --out.

--recipe is for accuracy and speed, with images that fit into the memory of the device: they are
decoded once, and cropped, flipped and cut out in whole batches there, labels are smoothed, and a
GPU computes in 16 bits. The goal is 94 % on CIFAR-10 in less than a minute on an H100 for the
training on all samples. This was not measured on a GPU. docs/results.md compares the recipe with
plain training on a CPU.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from contextlib import nullcontext
from math import ceil
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Subset
from torchvision import models, transforms
from torchvision.datasets import CIFAR10, CIFAR100, FakeData, ImageFolder

from drophot import ForgettingTracker, IndexedDataset, magnitude_prune, select, summary
from drophot.prune import save_compressed
from drophot.training import batches, in_memory

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10
SMOOTHING = 0.1  # of labels, with --recipe

parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
parser.add_argument("--data", default="cifar10", choices=["cifar10", "cifar100", "folder"])
parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of the data")
parser.add_argument("--download", action="store_true", help="download CIFAR if it is missing")
parser.add_argument("--model", default="resnet18", choices=["resnet18", "resnet34", "resnet50"])
parser.add_argument("--image-size", type=int, default=32, help="images are resized to this")
parser.add_argument("--epochs", type=int, default=30, help="epochs of each of the three trainings")
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--lr", type=float, default=0.1, help="highest learning rate")
parser.add_argument("--finetune-lr", type=float, default=0.02, help="the same, in fine-tuning")
parser.add_argument("--data-ratio", type=float, default=0.5, help="share of samples kept")
parser.add_argument("--mode", default="high", choices=["high", "low", "random"])
parser.add_argument("--prune-ratio", type=float, default=0.8, help="share of weights removed")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
parser.add_argument("--amp", action="store_true", help="autocast; slow on CPUs without bfloat16")
parser.add_argument("--recipe", action="store_true", help="augment on the device, smooth labels")
parser.add_argument("--workers", type=int, default=2, help="processes that load images")
parser.add_argument("--out", type=Path, default=Path("resnet_cifar"), help="folder of checkpoints")
parser.add_argument("--smoke", action="store_true", help="a quick test on generated images")


def main():
    args = parser.parse_args()
    args.amp |= args.recipe and args.device == "cuda"
    if args.smoke:
        args.image_size, args.batch_size, args.epochs, args.workers = 8, 32, 2, 0
    try:
        train_set, test_set, num_classes = read_data(args)
    except (FileNotFoundError, RuntimeError) as error:
        fix = "Choose another --data-root." if args.data == "folder" else "Add --download."
        parser.error(f"found no {args.data} in {args.data_root} ({error}). {fix}")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    indexed = IndexedDataset(train_set)  # drophot: (image, label) becomes (image, label, index)
    tracker = ForgettingTracker(total := len(indexed))  # drophot: track
    if args.recipe:  # drophot: decoded once, on the device
        indexed, test_set = (in_memory(data, args.device) for data in (indexed, test_set))
    baseline = resnet(num_classes, args)
    everything = train("score", baseline, indexed, test_set, args, args.lr, tracker=tracker)

    # drophot: select
    indices = select(tracker.scores(), args.data_ratio, args.mode, seed=args.seed)
    coreset = Subset(indexed, indices.tolist())  # drophot: an ordinary dataset to train on
    model = resnet(num_classes, args)
    trained = train("train", model, coreset, test_set, args, args.lr)

    masks = magnitude_prune(model, args.prune_ratio)  # drophot: prune
    pruned = accuracy(model, test_set, args)
    finetuned = train("finetune", model, indexed, test_set, args, args.finetune_lr, masks=masks)

    save_compressed(model, args.out / "model.drophot")  # drophot: a file without the zeros
    print(summary(model))  # drophot: layer by layer
    print(f"\n{len(coreset):,} of {total:,} samples kept, mode {args.mode}. {masks}")
    print(f"trained on all samples   {everything:7.2%}")
    print(f"trained on the coreset   {trained:7.2%}")
    print(f"pruned                   {pruned:7.2%}")
    print(f"fine-tuned               {finetuned:7.2%}")


def train(stage, model, dataset, test_set, args, lr, tracker=None, masks=None):
    """Train a model, or resume its training, and return the test accuracy after the last epoch."""
    steps = args.epochs * ceil(len(dataset) / args.batch_size)
    optimizer = SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    scheduler = OneCycleLR(optimizer, lr, total_steps=steps)
    float16 = args.amp and autocast(args).fast_dtype == torch.float16
    scaler = torch.amp.GradScaler(args.device, enabled=float16)
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
        torch.set_rng_state(saved["rng"])  # shuffling, augmentation and dropout draw from these
        if args.device == "cuda":
            torch.cuda.set_rng_state(saved["cuda_rng"])
        epochs, test_accuracy = saved["epochs"], saved["accuracy"]

    with nullcontext() if masks is None else masks.hold(optimizer):  # drophot: zeros stay zero
        for epoch in range(epochs, args.epochs):
            model.train()
            for images, labels, index in shuffled(dataset, args):
                images = images.to(args.device, non_blocking=True)
                labels = labels.to(args.device, non_blocking=True)
                with autocast(args):
                    logits = model(images)
                    smoothing = SMOOTHING if args.recipe else 0.0
                    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                if tracker is not None:
                    tracker.update(index, logits, labels)  # drophot: track
            test_accuracy = accuracy(model, test_set, args)
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


def shuffled(dataset, args):
    """The augmented batches of an epoch, in a new order."""
    if not args.recipe:  # the transform of the dataset augments
        workers = {"num_workers": args.workers, "pin_memory": args.device == "cuda"}
        yield from DataLoader(dataset, args.batch_size, shuffle=True, **workers)
        return
    order = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    device = torch.device(args.device)
    for images, labels, index in batches(dataset, args.batch_size, device, shuffle=order):
        yield augment(images), labels, index


def augment(images):
    """Random crops, flips and holes of a batch `(B, C, H, W)`, with separate draws for each image.

    Images are padded by an eighth of their height, by reflection, and lose a square whose side is a
    quarter of it (cutout). The random numbers are those of torch's generator of the device.
    """
    count, _, height, width = images.shape
    padding, hole = height // 8, height // 4

    def draw(end):
        return torch.randint(end, (count, 1), device=images.device)

    top, left, flip = draw(2 * padding + 1), draw(2 * padding + 1), draw(2) > 0
    across = torch.arange(width, device=images.device)
    down = torch.arange(height, device=images.device)
    columns = torch.where(flip, across.flip(0), across) + left
    rows = down + top
    padded = F.pad(images, (padding,) * 4, mode="reflect").permute(0, 2, 3, 1)
    sample = torch.arange(count, device=images.device)
    cropped = padded[sample[:, None, None], rows[:, :, None], columns[:, None, :]]
    cropped = cropped.permute(0, 3, 1, 2)
    from_top, from_left = down - draw(height) + hole // 2, across - draw(width) + hole // 2
    in_rows, in_columns = ((at >= 0) & (at < hole) for at in (from_top, from_left))
    return cropped.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)


@torch.no_grad()
def accuracy(model, dataset, args):
    model.eval()
    correct = total = 0
    size, device = 2 * args.batch_size, torch.device(args.device)
    if args.recipe:
        loader = batches(dataset, size, device)
    else:
        loader = DataLoader(dataset, size, num_workers=args.workers)
    for images, labels in loader:
        with autocast(args):
            predictions = model(images.to(args.device)).argmax(1)
        correct += (predictions == labels.to(args.device)).sum().item()
        total += len(labels)
    return correct / total


def resnet(num_classes, args):
    model = getattr(models, args.model)(num_classes=num_classes)
    if args.image_size <= 64:  # the usual stem for small images, which keeps their resolution
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model.to(args.device, memory_format=torch.channels_last)


def autocast(args):
    bfloat16 = args.device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if bfloat16 else torch.float16
    return torch.autocast(args.device, dtype, enabled=args.amp)


def read_data(args):
    size, root = args.image_size, args.data_root
    normalize = transforms.Normalize(MEAN, STD)
    augment = transforms.Compose([
        transforms.Resize(size),
        transforms.RandomCrop(size, padding=size // 8, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        normalize,
    ])
    plain = transforms.Compose([
        transforms.Resize(size),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        normalize,
    ])
    if args.recipe:
        augment = plain  # batches are augmented instead
    if args.smoke:
        shape = (3, size, size)
        return FakeData(64, shape, transform=augment), FakeData(32, shape, transform=plain), 10
    if args.data == "folder":
        train_set = ImageFolder(root / "train", augment)
        return train_set, ImageFolder(root / "test", plain), len(train_set.classes)
    cifar = CIFAR10 if args.data == "cifar10" else CIFAR100
    train_set = cifar(root, train=True, transform=augment, download=args.download)
    test_set = cifar(root, train=False, transform=plain, download=args.download)
    return train_set, test_set, len(train_set.classes)


if __name__ == "__main__":
    main()
