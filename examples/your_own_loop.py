"""Your own training loop. The lines that drophot adds are marked with #+.

It trains on scikit-learn's digits (1,797 real images, no download) and counts forgetting events.
Then it trains a new network on the third of the samples that was forgotten most often, removes 80 %
of its weights and fine-tunes the remaining weights on all samples.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from drophot import ForgettingTracker, IndexedDataset, evaluate, magnitude_prune, select  # +

parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
parser.add_argument("--epochs", type=int, default=20, help="epochs of each of the three trainings")
parser.add_argument("--device", default="cpu", help="cpu or cuda; cpu is faster here")
options = parser.parse_args()
print(
    f"3 trainings of {options.epochs} epochs: about {2 + options.epochs // 4} seconds on one core."
)
torch.manual_seed(0)
torch.set_num_threads(1)

images, targets = load_digits(return_X_y=True)
images, targets = torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(targets)
shuffled = torch.randperm(len(images))
train_set = TensorDataset(images[shuffled[360:]], targets[shuffled[360:]])
test_set = TensorDataset(images[shuffled[:360]], targets[shuffled[:360]])

train_set = IndexedDataset(train_set)  # + samples now carry their index
tracker = ForgettingTracker(len(train_set))  # +


def network():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(options.device)


def train(model, dataset, optimizer, track=False):
    loader = DataLoader(dataset, batch_size=32, shuffle=True)
    for _ in range(options.epochs):
        for inputs, labels, index in loader:
            inputs, labels = inputs.to(options.device), labels.to(options.device)
            logits = model(inputs)
            loss = nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if track:
                tracker.update(index, logits, labels)  # +


model = network()
train(model, train_set, torch.optim.Adam(model.parameters()), track=True)
print(f"trained on all {len(train_set)} samples: {100 * evaluate(model, test_set):.2f} %")

coreset = Subset(train_set, select(tracker.scores(), 1 / 3).tolist())  # + the most forgotten
model = network()
optimizer = torch.optim.Adam(model.parameters())
train(model, coreset, optimizer)
print(f"trained on {len(coreset)} of them: {100 * evaluate(model, test_set):.2f} %")

masks = magnitude_prune(model, 0.8)  # +
print(f"pruned: {100 * evaluate(model, test_set):.2f} %. {masks}")
with masks.hold(optimizer):  # + zeros stay zero, despite momentum
    train(model, train_set, optimizer)
print(f"fine-tuned: {100 * evaluate(model, test_set):.2f} %, zeros {masks.sparsity:.2f}")
assert all((model.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())
