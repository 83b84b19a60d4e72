"""
Which samples each method keeps
===============================

The data are three classes in the plane, one of them more spread out than the others. Six methods
keep 5 % of 1,200 samples. The scores are EL2N (Paul et al. 2021), the mean error over the training
of a small network. K-center and facility location use only the positions of the samples. Gray
samples are not kept, and the markers show the classes.
"""

import matplotlib.pyplot as plt
import torch
from torch.utils.data import TensorDataset

from drophot import (
    DynamicsTracker,
    IndexedDataset,
    Stratified,
    facility_location,
    fit,
    k_center,
    select,
)
from drophot.models import fcnet

draws = torch.Generator().manual_seed(0)
targets = torch.arange(1200) % 3
centres = torch.tensor([[-1.5, -0.8], [1.5, -0.8], [0.0, 1.6]])
spread = torch.tensor([0.6, 0.6, 0.9])
points = centres[targets] + spread[targets, None] * torch.randn(1200, 2, generator=draws)

dataset = IndexedDataset(TensorDataset(points, targets))
tracker = DynamicsTracker(len(dataset))
torch.manual_seed(0)
model = fcnet(in_features=2, hidden=32, num_classes=3)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
fit(model, dataset, 10, optimizer=optimizer, on_batch=tracker.update)
scores = tracker.scores("el2n")

# %%
# Each method returns the same number of positions, in ascending order. ``ratio`` is the share kept.

ratio = 0.05
coresets = {
    "random": select(scores, ratio, "random"),
    "high: the hardest": select(scores, ratio, "high"),
    "low: the easiest": select(scores, ratio, "low"),
    "Stratified: every difficulty": select(scores, ratio, Stratified()),
    "k_center: none is far away": k_center(points, ratio).indices,
    "facility_location: medoids": facility_location(points, ratio).indices,
}
looks = [("o", "#0072B2"), ("^", "#D55E00"), ("s", "#009E73")]
figure, axes = plt.subplots(2, 3, figsize=(8, 5.6), layout="constrained", sharex=True, sharey=True)
for ax, (name, kept) in zip(axes.flat, coresets.items(), strict=True):
    ax.scatter(*points.T.numpy(), s=4, color="0.8", linewidths=0)
    for label, (marker, color) in enumerate(looks):
        x, y = points[kept[targets[kept] == label]].T.numpy()
        ax.scatter(x, y, s=24, marker=marker, color=color)
    ax.set(title=name, xticks=[], yticks=[], aspect="equal")
plt.show()

# %%
# How far is a sample from the nearest sample that was kept? The two methods that use positions are
# the best at their own objective: k-center has the smallest maximum distance, facility location the
# smallest mean.

near = {name: torch.cdist(points, points[kept]).amin(1) for name, kept in coresets.items()}
assert all(len(kept) == 60 for kept in coresets.values())
assert min(near, key=lambda name: float(near[name].max())).startswith("k_center")
assert min(near, key=lambda name: float(near[name].mean())).startswith("facility_location")
assert scores[coresets["high: the hardest"]].min() > scores[coresets["low: the easiest"]].max()
assert near["low: the easiest"].mean() > 2 * near["random"].mean()
