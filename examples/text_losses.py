"""Find scrambled sentences by the loss of a tiny language model.

Sentences of a small grammar are padded to one length, and in a tenth of them the words are in
random order. A causal language model is trained on all of them while a tracker follows the loss of
each sentence. Afterwards, each score is evaluated by how well it separates scrambled sentences from
the others. The AUROC is the probability that a scrambled sentence has the higher score; 0.5 is
chance. It takes a few seconds on one core of a CPU.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from drophot import DynamicsTracker, IndexedDataset, select
from drophot.tracking import Last, MovingAverage, sequence_losses

PARTS = [
    ["the", "a", "one"],
    ["old", "young", "tall", "quiet"],
    ["baker", "pilot", "singer", "farmer"],
    ["sees", "hears", "meets", "knows"],
    ["the", "a", "one"],
    ["dog", "horse", "bird", "cat"],
    ["today", "again"],
]
WORDS = ["<pad>", *sorted({word for part in PARTS for word in part})]

parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
parser.add_argument("--sentences", type=int, default=2000)
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cpu", help="cpu or cuda")
options = parser.parse_args()
torch.manual_seed(options.seed)
torch.set_num_threads(1)


def sentence(scrambled: bool) -> Tensor:
    """Tokens of a sentence of 5 to 7 words, padded with 0."""
    length = int(torch.randint(5, len(PARTS) + 1, ()))
    words = [part[int(torch.randint(len(part), ()))] for part in PARTS[:length]]
    tokens = torch.tensor([WORDS.index(word) for word in words])
    if scrambled:
        tokens = tokens[torch.randperm(length)]
    return nn.functional.pad(tokens, (0, len(PARTS) - length))


class LanguageModel(nn.Module):
    """Predicts the next token from those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), 16)
        self.recurrent = nn.GRU(16, 32, batch_first=True)
        self.head = nn.Linear(32, len(WORDS))

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits of the next token at each position."""
        return self.head(self.recurrent(self.words(tokens))[0])


scrambled = torch.rand(options.sentences) < 0.1
tokens = torch.stack([sentence(bool(wrong)) for wrong in scrambled])
data = IndexedDataset(TensorDataset(tokens))
tracker = DynamicsTracker(len(data), statistics=["loss", Last(), MovingAverage(decay=0.5)])
model = LanguageModel().to(options.device)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(options.epochs):
    for batch, index in DataLoader(data, batch_size=32, shuffle=True):
        batch = batch.to(options.device)
        logits = model(batch)
        labels = batch.masked_fill(batch == 0, -100)  # padding is left out
        tracker.update_loss(index, sequence_losses(logits, labels, shift=True))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def auroc(scores: Tensor) -> float:
    wrong, right = scores[scrambled], scores[~scrambled]
    above = (wrong[:, None] > right).double() + 0.5 * (wrong[:, None] == right)
    return float(above.mean())


print(f"AUROC of {int(scrambled.sum())} scrambled sentences among {len(data)}:")
for name in tracker.statistics:
    print(f"{name:<13} {auroc(tracker.scores(name).cpu()):.3f}")
kept = select(tracker.scores("loss"), 0.9, "low")
print(f"Among the 90 % with the lowest loss, {int(scrambled[kept].sum())} are left.")
