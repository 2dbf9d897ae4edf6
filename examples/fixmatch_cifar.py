"""Train FixMatch, with or without gradient consistency, on small images.

Examples:
    python fixmatch_cifar.py --preset demo
    python fixmatch_cifar.py --labels 250 --seed 1
    python fixmatch_cifar.py --dataset folder --data-dir photos --labels 250 --arch wrn-10-2 --steps 20000
    python fixmatch_cifar.py --config runs/first/config.json --seed 2
    python fixmatch_cifar.py --init-from runs/first/model.safetensors --labels 250
"""

from __future__ import annotations

import sys

from trainer.launch import start

if __name__ == "__main__":
    sys.exit(start("fixmatch_cifar.py", str(__doc__), "CIFAR"))
