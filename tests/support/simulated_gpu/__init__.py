"""A GPU in software: genuine `cuda:0` tensors on a machine without a GPU, with values, errors and counts.

Two parts. `runtime.c` is loaded in place of the CUDA runtime and says that there is one device; its memory is the
host's. Tensors, autograd, vmap, autocast, the caching allocator and pinned memory are then torch's own. `SimulatedGPU`
is a mode that runs every operator on a CPU tensor over the same memory. It raises where CUDA would, when tensors or
generators of two devices meet, and counts kernels, host reads and copies by file and line.

    environment = os.environ | build.environment()
    subprocess.run([sys.executable, "-m", "support.simulated_gpu", "program.py", "--device", "cuda"], env=environment)

What it cannot show: time, the numerics of CUDA's kernels (TF32, the order of sums), races between streams, NCCL.
"""

from .build import environment, missing
from .device import SimulatedGPU

__all__ = ["SimulatedGPU", "environment", "missing"]
