"""Train FixMatch, with or without gradient consistency, on ImageNet or your own photographs, on many processes.

Examples:
    torchrun --standalone --nproc-per-node 8 fixmatch_imagenet.py --data-dir imagenet --ggcr-max-pairs 64
    python fixmatch_imagenet.py --data-dir photos --arch resnet18 --label-fraction 0.1 --steps 20000
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 fixmatch_imagenet.py --data-dir photos
"""

from __future__ import annotations

import sys

from trainer.launch import start

if __name__ == "__main__":
    sys.exit(start("fixmatch_imagenet.py", str(__doc__), "IMAGENET"))
