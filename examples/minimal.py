"""FixMatch with gradient consistency in plain PyTorch: 40 labeled digits, 1,257 unlabeled ones, under a minute.

    python examples/minimal.py

It uses nothing from the trainers. Three lines add gradient consistency to FixMatch; each is marked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss

STEPS = 300
WARMUP = 50  # steps before the term is added: early pseudo-labels are mostly wrong
THRESHOLD = 0.95  # confidence from which a pseudo-label counts
WEIGHT = 0.1  # of the term


def weak(x: Tensor) -> Tensor:
    """Each image shifted by up to one pixel."""
    shifts = torch.randint(-1, 2, (len(x), 2)).tolist()
    return torch.stack([image.roll(shift, dims=(1, 2)) for image, shift in zip(x, shifts, strict=True)])


def strong(x: Tensor) -> Tensor:
    """Shifted as well, with another contrast and noise."""
    return weak(x) * (0.5 + torch.rand(len(x), 1, 1, 1)) + 0.3 * torch.randn_like(x)


def main(steps: int = STEPS) -> float:
    """Train for `steps` steps; print the losses on the way, and return the test accuracy."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = torch.arange(1797).split([1297, 500])
    labeled = torch.cat([train[labels[train] == digit][:4] for digit in range(10)])
    unlabeled = train[~torch.isin(train, labeled)]

    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
    )  # fmt: skip
    model = nn.Sequential(encoder, nn.Linear(32 * 4 * 4, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    gc = GradientConsistencyLoss(model, encoder=encoder)  # gradient consistency, 1 of 3

    for step in range(steps):
        x = labeled[torch.randint(len(labeled), (16,))]
        u = images[unlabeled[torch.randint(len(unlabeled), (32,))]]
        u_weak, u_strong = weak(u), strong(u)

        supervised = F.cross_entropy(model(weak(images[x])), labels[x])
        with torch.no_grad():
            confidence, pseudo_label = model(u_weak).softmax(dim=1).max(dim=1)
        mask = (confidence >= THRESHOLD).float()
        unsupervised = (mask * F.cross_entropy(model(u_strong), pseudo_label, reduction="none")).mean()
        loss = supervised + unsupervised
        if step >= WARMUP:  # gradient consistency, 2 of 3
            loss = loss + WEIGHT * gc(u_weak, u_strong, pseudo_label, mask)  # gradient consistency, 3 of 3

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}  confident {mask.mean().item():.0%}")

    model.eval()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(dim=1) == labels[test]).float().mean().item()
    print(f"accuracy on {len(test)} test digits: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
