"""Find wrong labels in MNIST by training dynamics.

A tenth of the labels is flipped, and a network is trained on them for a few epochs while a tracker
computes scores from the logits of each sample. Afterwards, each score is evaluated by how well it
separates flipped samples from correct ones. The AUROC is the probability that a flipped sample
ranks above a correct one; 0.5 is chance. The most suspicious digits are drawn with their given
labels.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path
from time import perf_counter

import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torch.utils.data import TensorDataset
from torchvision.datasets import MNIST

from drophot import DynamicsTracker, IndexedDataset, fit, select
from drophot.models import fcnet, lenet

MODELS = {"fcnet": fcnet, "lenet": lenet}
SECONDS = {"fcnet": 4.0, "lenet": 12.0}  # an epoch of 60,000 images, tracked, on one core

parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
parser.add_argument("--data-root", default="data", help="folder that contains MNIST/raw")
parser.add_argument("--download", action="store_true", help="download MNIST if it is missing")
parser.add_argument("--model", default="fcnet", choices=list(MODELS))
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--noise", type=float, default=0.1, help="share of labels flipped")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cpu", help="cpu or cuda")
parser.add_argument("--out", type=Path, default=Path("find_mislabeled.png"))
options = parser.parse_args()
try:
    mnist = MNIST(options.data_root, download=options.download)
except RuntimeError as error:
    parser.error(
        f"found no MNIST in {options.data_root} ({error}). To download it, add --download."
    )
print(
    f"{options.model}, {options.epochs} epochs of {len(mnist):,} images: "
    f"about {SECONDS[options.model] * options.epochs:.0f} seconds on one core of a CPU."
)
start = perf_counter()
torch.manual_seed(options.seed)
torch.set_num_threads(1)

targets = mnist.targets.clone()
flipped = torch.rand(len(mnist)) < options.noise
others = torch.randint(1, 10, (int(flipped.sum()),))
targets[flipped] = (targets[flipped] + others) % 10  # any class except the correct one

images = mnist.data[:, None].float() / 127.5 - 1
train_set = IndexedDataset(TensorDataset(images, targets))
tracker = DynamicsTracker(len(train_set))
model = MODELS[options.model]().to(options.device)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
fit(
    model,
    train_set,
    options.epochs,
    optimizer=optimizer,
    seed=options.seed,
    on_batch=tracker.update,
)

suspicion = {  # larger is more suspicious
    "aum": -tracker.scores("aum"),
    "el2n": tracker.scores("el2n"),
    "confidence": -tracker.scores("confidence"),
    "loss": tracker.scores("loss"),
    "variability": tracker.scores("variability"),
    "forgetting, never learned = hardest": tracker.scores("forgetting"),
    "forgetting counts": tracker.counts,
}
print(f"\n{int(flipped.sum()):,} of {len(targets):,} labels flipped. AUROC of each score:\n")
for name, scores in suspicion.items():
    print(f"{name:36} {roc_auc_score(flipped, scores.cpu()):.4f}")

share = float(flipped.float().mean())
suspects = select(suspicion["aum"], share)
found = float(flipped[suspects].float().mean())
print(f"\nOf the {len(suspects):,} samples with the lowest AUM, {found:.1%} are flipped.")

drawing = Figure(figsize=(10, 3.4), layout="constrained")
drawing.suptitle("The twenty most suspicious digits by AUM, with the labels that they were given")
worst = suspicion["aum"].cpu().argsort(descending=True)[:20]
for ax, sample in zip(drawing.subplots(2, 10).flat, worst.tolist(), strict=True):
    ax.imshow(mnist.data[sample], cmap="gray_r")
    ax.set_title(f"“{int(targets[sample])}”")
    ax.set_xlabel(f"no. {sample}\nMNIST says {int(mnist.targets[sample])}", fontsize=7)
    ax.set_xticks([])
    ax.set_yticks([])
drawing.savefig(options.out, dpi=150)
print(f"{perf_counter() - start:.0f} seconds. Figure: {options.out}")
