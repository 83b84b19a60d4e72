"""
Keeping pruned weights at zero
==============================

Pruned weights are zero right after pruning. The next step of the optimizer changes them, unless the
masks are held. One network is trained on half of the digits and pruned to several ratios. Each
pruned network is fine-tuned twice, with and without holding its masks.
"""

import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from drophot import Masks, evaluate, fit, magnitude_prune
from drophot.models import fcnet

images, targets = load_digits(return_X_y=True)
images, targets = torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(targets)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train_set = TensorDataset(images[order[:900]], targets[order[:900]])
test_set = TensorDataset(images[order[900:]], targets[order[900:]])


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=3e-3)


torch.manual_seed(0)
trained = fcnet(in_features=64)
fit(trained, train_set, 5, optimizer=adam(trained))

# %%
# ``ratio`` is the share removed. At 0 nothing is removed, and the dense network is trained further.

ratios = [0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95]
pruned, finetuned, held, free = [], [], [], []
for ratio in ratios:
    model = copy.deepcopy(trained)
    masks = magnitude_prune(model, ratio)
    loose = copy.deepcopy(model)
    pruned.append(100 * evaluate(model, test_set))
    optimizer = adam(model)
    with masks.hold(optimizer):  # keeps removed weights at zero after each step
        fit(model, train_set, 5, optimizer=optimizer)
    finetuned.append(100 * evaluate(model, test_set))
    held.append(100 * Masks.from_zeros(model).sparsity)
    fit(loose, train_set, 5, optimizer=adam(loose))
    free.append(100 * Masks.from_zeros(loose).sparsity)

x = [100 * ratio for ratio in ratios]
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
left.plot(x, finetuned, "s--", color="#D55E00", label="fine-tuned, masks held")
left.plot(x, pruned, "o-", color="#0072B2", label="right after pruning")
left.set(ylabel="test accuracy (%)", ylim=(0, 104))
right.plot(x, held, "s--", color="#D55E00", label="masks held")
right.plot(x, free, "^:", color="#009E73", label="masks not held")
right.set(ylabel="zeros after fine-tuning (%)", ylim=(-4, 104))
for ax in (left, right):
    ax.set(xlabel="weights removed (%)")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
plt.show()

# %%
# Fine-tuning recovers the accuracy that pruning cost, and held weights are still zero afterwards.

assert all(abs(zeros - removed) < 0.01 for zeros, removed in zip(held, x, strict=True))
assert max(free) < 20
assert finetuned[4] > pruned[4] > 60
assert pruned[6] < 60
assert finetuned[6] > pruned[6] + 10
