"""An algorithm of semilearn (USB) on scikit-learn's digits, with gradient consistency attached.

    pip install 'gradconsist[usb]'
    python examples/usb_fixmatch.py
    python examples/usb_fixmatch.py --algorithm softmatch --steps 2000

semilearn trains on a GPU only.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy
import torch

from gradconsist import GradientConsistencyLoss
from gradconsist.adapters import usb
from trainer.launch import Parser, guarded


def digits(config: Any) -> dict[str, Any]:
    """Semilearn's loaders of 1,797 images of 8x8: 4 labels a class, 300 test images, the rest without labels."""
    from semilearn import BasicDataset, get_data_loader
    from semilearn.datasets.augmentation import RandAugment
    from sklearn.datasets import load_digits
    from torchvision import transforms

    data = load_digits()
    images = numpy.uint8(data.images * 15.9)[..., None].repeat(3, axis=3)
    order = numpy.random.default_rng(0).permutation(len(images))
    test, train = order[:300], order[300:]
    labeled = numpy.concatenate([train[data.target[train] == c][:4] for c in range(10)])

    to_tensor = [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    weak = transforms.Compose([transforms.RandomCrop(8, padding=1), *to_tensor])
    # BasicDataset gives PseudoLabel one view only, and FixMatch's two are what the term compares.
    kind = "fixmatch" if config.algorithm == "pseudolabel" else config.algorithm
    strong = transforms.Compose([transforms.RandomCrop(8, padding=1), RandAugment(3, 5), *to_tensor])
    sets = {
        "train_lb": BasicDataset(kind, images[labeled], data.target[labeled], 10, weak),
        "train_ulb": BasicDataset(kind, images[train], None, 10, weak, is_ulb=True, strong_transform=strong),
        "eval": BasicDataset(kind, images[test], data.target[test], 10, transforms.Compose(to_tensor)),
    }
    many = config.batch_size * config.uratio
    return {
        "train_lb": get_data_loader(config, sets["train_lb"], config.batch_size, num_workers=0),
        "train_ulb": get_data_loader(config, sets["train_ulb"], many, num_workers=0),
        "eval": get_data_loader(config, sets["eval"], 300, data_sampler=None, num_workers=0, drop_last=False),
    }


def main() -> int:
    """Train, and say where the schedule and the accuracy stand."""
    parser = Parser("usb_fixmatch.py", __doc__)
    parser.add_argument("--algorithm", default="fixmatch")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from semilearn import get_algorithm, get_config, get_net_builder  # not needed for --help

    random.seed(options.seed)
    numpy.random.seed(options.seed)
    torch.manual_seed(options.seed)
    config = get_config(
        {
            "algorithm": options.algorithm, "net": "wrn_28_2", "num_classes": 10,
            "dataset": "none",  # the loaders are ours
            "num_train_iter": options.steps, "num_eval_iter": options.steps, "num_log_iter": 50,
            "batch_size": 8, "uratio": 7, "ulb_dest_len": 1497,
            "gpu": 0, "distributed": False, "world_size": 1, "rank": 0,
        }
    )  # fmt: skip
    algorithm = get_algorithm(config, get_net_builder(config.net, from_name=False), tb_log=None, logger=None)
    algorithm.model.cuda(config.gpu)
    algorithm.ema_model.cuda(config.gpu)
    algorithm.loader_dict = digits(config)

    consistency = GradientConsistencyLoss(
        algorithm.model, encoder=lambda name: not name.startswith("classifier."), max_pairs=16
    )
    handle = usb.attach(algorithm, consistency, weight=0.1, warmup_steps=options.steps // 4)
    algorithm.train()

    print(f"{handle.wrapper.step} steps, with the term from step {handle.wrapper.warmup_steps} on")
    print(f"test accuracy of the averaged model: {algorithm.best_eval_acc:.3f}")
    handle.detach()
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, extra="usb"))
