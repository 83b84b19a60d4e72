"""
Training on little data
=======================

How accurate is a network that was trained on a share of the samples? Random samples are the control
that a score has to beat. ``"high"`` keeps the samples that were forgotten most often. The third
mode spreads the selection over all margins (AUM) with :class:`~drophot.coreset.Stratified`. A grid
trains all of them with five seeds each, and its records are drawn with 95 % intervals.
"""

from functools import partial
from statistics import mean
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from drophot import DropHot, Grid, Scored, Stratified
from drophot.models import fcnet
from drophot.report import plot_ratios

images, targets = load_digits(return_X_y=True)
images, targets = torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(targets)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
images, targets = images[order], targets[order]

spread = Scored("aum", Stratified(hard="low"))
run = DropHot(
    partial(fcnet, in_features=64, hidden=64),
    train_set=TensorDataset(images[:1000], targets[:1000]),
    test_set=TensorDataset(images[1000:], targets[1000:]),
    data_ratio=0.1,  # replaced by the ratios of the grid
    mode="high",
    prune_ratio=0.5,
    finetune_epochs=0,  # only training matters here
    forgetting="toneva",
    optimizer=partial(torch.optim.Adam, lr=3e-3),
    batch_size=32,
)
shares = [0.1, 0.2, 0.4]  # kept
modes = ["random", "high", spread]
grid = Grid(run, data_ratios=shares, modes=modes, prune_ratios=[0.5], seeds=range(5))
with TemporaryDirectory() as store:
    records = [record for record in grid.run(store) if record.prune_ratio == 0.5]

figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
plot_ratios(records, measure="trained_accuracy", ax=ax)
plt.show()

# %%
# With 10 % kept, the network is less accurate with the samples forgotten most often than with
# random ones. With 40 % kept the differences are small, and the order is reversed.


def accuracy(mode, share):
    cell = [r for r in records if (r.mode, r.keep_ratio) == (str(mode), share)]
    return mean(record.trained_accuracy for record in cell)


assert accuracy("high", 0.1) < accuracy("random", 0.1) - 0.05
assert accuracy("high", 0.1) < accuracy(spread, 0.1) - 0.05
assert accuracy(spread, 0.4) > accuracy("random", 0.4)
assert accuracy("random", 0.4) < accuracy("baseline", 1.0)
