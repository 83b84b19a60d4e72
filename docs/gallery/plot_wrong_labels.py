"""
Wrong labels have the lowest margins
====================================

A tenth of the labels is flipped, and a network is trained on the resulting data. The area under the
margin, AUM (Pleiss et al. 2020), is the logit of the given label minus the largest other logit,
averaged over training. A wrong label contradicts the labels of similar samples, so its margin stays
low.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch.utils.data import TensorDataset

from drophot import DynamicsTracker, IndexedDataset, fit, select
from drophot.models import fcnet

images, right = load_digits(return_X_y=True)
images, right = torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(right)
draws = torch.Generator().manual_seed(0)
flipped = torch.rand(len(right), generator=draws) < 0.1
others = torch.randint(1, 10, right.shape, generator=draws)
given = torch.where(flipped, (right + others) % 10, right)  # any class except the correct one

dataset = IndexedDataset(TensorDataset(images, given))
tracker = DynamicsTracker(len(dataset))
torch.manual_seed(0)
model = fcnet(in_features=64)
optimizer = torch.optim.Adam(model.parameters())
fit(model, dataset, 10, optimizer=optimizer, on_batch=tracker.update)

# %%
# AUROC is the probability that a flipped sample has a lower AUM than a correctly labeled one.

aum, flipped = tracker.scores("aum").numpy(), flipped.numpy()
auroc = roc_auc_score(flipped, -aum)
worst = aum.argsort()[:12]  # a lower margin is more suspicious

figure = plt.figure(figsize=(8, 3.8), layout="constrained")
left, side = figure.subfigures(1, 2, width_ratios=[1.4, 1])
ax = left.subplots()
bins = np.linspace(aum.min(), aum.max(), 41)
bars = {"edgecolor": "black", "linewidth": 0.5}
ax.hist(aum[~flipped], bins, label="right label", color="#56B4E9", **bars)
ax.hist(aum[flipped], bins, label="flipped", color="#D55E00", hatch="////", **bars)
ax.set(xlabel="AUM", ylabel="digits", title=f"AUROC {auroc:.3f}")
ax.legend(frameon=False)
side.suptitle("lowest AUM: given label, right label", fontsize="medium")
for ax, sample in zip(side.subplots(3, 4).flat, worst, strict=True):
    ax.imshow(images[sample].view(8, 8).numpy(), cmap="gray_r")
    ax.set(xticks=[], yticks=[])
    ax.set_xlabel(f"“{given[sample]}”, {right[sample]}")
plt.show()

# %%
# Forgetting counts do not find wrong labels: a sample that is never correct is never forgotten.

suspects = select(aum, flipped.mean(), "low")  # the same number as were flipped
assert auroc > 0.98
assert flipped[suspects].mean() > 0.9
assert flipped[worst].all()
assert roc_auc_score(flipped, tracker.counts.numpy()) < 0.6
