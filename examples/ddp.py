"""Track samples in several processes: `torchrun --nproc-per-node=2 examples/ddp.py`.

Trains a small network with DistributedDataParallel on scikit-learn's digits (1,797 real images, no
download). Each process tracks the samples that it sees. `sync`, called once per epoch, gives every
process the state of a single process that saw all samples, including those that DistributedSampler
repeats to fill its last batch. Without torchrun the script runs in one process.
"""

import os
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from drophot import DynamicsTracker, IndexedDataset, select  # +

parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument(
    "--device", default="cpu", choices=["cpu", "cuda"], help="cuda: one GPU for each process"
)
options = parser.parse_args()

ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
local = int(os.environ.get("LOCAL_RANK", "0"))
device = torch.device(options.device, local if options.device == "cuda" else 0)
if device.type == "cuda":
    torch.cuda.set_device(device)
if ranks > 1:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
torch.manual_seed(0)
torch.set_num_threads(1)

images, targets = load_digits(return_X_y=True)
images = torch.tensor(images, dtype=torch.float32) / 8 - 1
train_set = IndexedDataset(TensorDataset(images, torch.tensor(targets)))  # +
tracker = DynamicsTracker(len(train_set))  # +

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
if ranks > 1:
    model = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
sampler = DistributedSampler(train_set, ranks, rank)
loader = DataLoader(train_set, batch_size=32, sampler=sampler)

tracker.attach(model)  # +
for epoch in range(options.epochs):
    sampler.set_epoch(epoch)
    for inputs, labels in tracker.watch(loader):  # + removes the index from the batch
        inputs, labels = inputs.to(device), labels.to(device)
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tracker.sync()  # + one gather per epoch

presented = tracker.presentations
assert presented.min() >= options.epochs, "every sample is presented in every epoch"
indices = select(tracker.scores("el2n"), 0.3)  # + the same samples on every rank
mine = torch.tensor(
    [int(indices.sum()), int(presented.sum()), int(tracker.counts.sum())], device=device
)
if ranks > 1:
    everybody = [torch.zeros_like(mine) for _ in range(ranks)]
    dist.all_gather(everybody, mine)
    assert all(torch.equal(mine, other) for other in everybody), "all ranks have the same state"
if rank == 0:
    print(
        f"{ranks} processes, {options.epochs} epochs of {len(train_set):,} samples: "
        f"{int(presented.sum()):,} presentations, {int(tracker.counts.sum()):,} forgetting events, "
        f"{len(indices)} samples kept, the same on every process."
    )
if ranks > 1:
    dist.barrier()
    dist.destroy_process_group()
