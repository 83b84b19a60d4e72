"""
Which digits are forgotten
==========================

A sample is :doc:`forgotten </forgetting>` if the network classified it correctly the last time and
is wrong now. Here a small network is trained on scikit-learn's 1,797 digits, and a tracker counts
how often each digit is forgotten, using the logits that training computes anyway.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from drophot import ForgettingTracker, IndexedDataset, fit, select
from drophot.models import fcnet

images, targets = load_digits(return_X_y=True)
images, targets = torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(targets)
dataset = IndexedDataset(TensorDataset(images, targets))  # samples now carry their index
tracker = ForgettingTracker(len(dataset))

torch.manual_seed(0)
model = fcnet(in_features=64)
optimizer = torch.optim.Adam(model.parameters())
fit(model, dataset, 20, optimizer=optimizer, on_batch=tracker.update)

# %%
# ``counts`` has only the events. ``scores()`` ranks samples that were never correct, and therefore
# never forgotten, above all others. Most digits are learned and never forgotten.

counts = tracker.counts
often = select(counts, 10 / len(dataset))  # the share kept: ten samples
never = select(tracker.scores(), 10 / len(dataset), "low")  # ten of the many that score 0

figure = plt.figure(figsize=(7, 4.6), layout="constrained")
top, middle, bottom = figure.subfigures(3, 1, height_ratios=[2.6, 1, 1])
ax = top.subplots()
bars = ax.bar(range(int(counts.max()) + 1), counts.bincount().tolist(), color="#0072B2", width=0.7)
ax.bar_label(bars)
ax.set(xlabel="forgetting events", ylabel="digits", ylim=(0, 1.12 * len(dataset)))
for rows, chosen, title in (
    (middle, often, "forgotten most often: label and events"),
    (bottom, never, "learned and never forgotten"),
):
    rows.suptitle(title, fontsize="medium")
    for ax, sample in zip(rows.subplots(1, 10), chosen, strict=True):
        ax.imshow(images[sample].view(8, 8).numpy(), cmap="gray_r")
        ax.set(xticks=[], yticks=[])
        ax.set_xlabel(f"“{targets[sample]}”, {counts[sample]}")
plt.show()

# %%
# Forgotten digits look less like the others of their class: they are farther from its mean image.

means = torch.stack([images[targets == digit].mean(0) for digit in range(10)])
distances = (images - means[targets]).norm(dim=1)
assert (counts == 0).float().mean() > 0.8
assert counts[often].min() >= 3
assert counts[never].max() == 0
assert distances[counts > 0].mean() > 1.1 * distances[counts == 0].mean()
