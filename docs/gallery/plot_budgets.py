"""
Which layers lose 90 % of the weights
=====================================

:func:`~drophot.prune.magnitude_prune` removes exactly the share asked for. Its ``scope`` says how
that share is divided among the layers: by one ranking of all weights, equally, by layer shapes
(ERK, Evci et al. 2020), or by a ranking that is independent of the scale of each layer (LAMP, Lee
et al. 2021).
"""

import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from drophot import evaluate, fit, magnitude_prune

images, targets = load_digits(return_X_y=True)
images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
targets = torch.tensor(targets)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train_set = TensorDataset(images[order[:1400]], targets[order[:1400]])
test_set = TensorDataset(images[order[1400:]], targets[order[1400:]])

torch.manual_seed(0)
convolutions = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU()
linear = nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)
model = nn.Sequential(*convolutions, nn.Flatten(), *linear)
fit(model, train_set, 5, optimizer=torch.optim.Adam(model.parameters(), lr=3e-3))

# %%
# Each scope prunes a copy. The legend has the test accuracy without fine-tuning.

scopes = {"global": ("#0072B2", ""), "layer": ("#E69F00", "//")}
scopes |= {"erk": ("#009E73", ".."), "lamp": ("#F0E442", "xx")}
figure, ax = plt.subplots(figsize=(8, 3.8), layout="constrained")
kept, accuracies = {}, {}
for number, (scope, (color, hatch)) in enumerate(scopes.items()):
    pruned = copy.deepcopy(model)
    masks = magnitude_prune(pruned, 0.9, scope=scope)
    assert abs(masks.sparsity - 0.9) < 1e-4  # the total, whatever the scope
    kept[scope] = [100 * float(mask.float().mean()) for mask in masks.values()]
    accuracies[scope] = evaluate(pruned, test_set)
    bars = ax.bar(
        [layer + 0.2 * (number - 1.5) for layer in range(4)],
        kept[scope],
        width=0.2,
        label=f"{scope}: accuracy {accuracies[scope]:.0%}",
        color=color,
        hatch=hatch,
        edgecolor="black",
    )
    ax.bar_label(bars, fmt="%.0f", fontsize="small")
names = ["first Conv2d", "second Conv2d", "first Linear", "last Linear"]
sizes = [f"{mask.numel():,} weights" for mask in masks.values()]
ax.set_xticks(range(4), [f"{name}\n{size}" for name, size in zip(names, sizes, strict=True)])
ax.set(ylabel="weights kept (%)", ylim=(0, 109))
ax.legend(frameon=False, loc="upper center")
plt.show()

# %%
# With equal shares, a layer of 72 weights loses the same share as one of 16,384. The other scopes
# keep more of the small first and last layers, and lose less accuracy.

assert all(abs(share - 10) < 0.5 for share in kept.pop("layer"))
assert all(small > 50 and large < 10 for small, _, large, _ in kept.values())
assert accuracies.pop("layer") < min(accuracies.values()) - 0.1
