"""The parts that the example trainers share: one idea per file, each readable on its own.

| file | what it holds |
| --- | --- |
| `config`, `cli`, `config_file` | the options, their defaults, what a preset changes, what may differ on resume |
| `datasets`, `folder`, `split` | images as one uint8 tensor, the balanced labeled split and its SHA-256 |
| `streams`, `augment`, `operations`, `randaugment` | randomness by counter, weak and strong views |
| `loader`, `waiting` | batches by step number, and whether a run waits for them |
| `models`, `ema`, `schedule` | Wide ResNets, the averaged model, the optimizer and its learning rate |
| `methods` | what is trained: supervised only, FixMatch, FixMatch with GGCR |
| `trainer`, `training`, `stopping`, `evaluation` | a step, the run, its pauses, the test accuracy |
| `weights` | the averaged weights as safetensors, and runs that start from weights |
| `files`, `rundir`, `checkpoint`, `runlog`, `plotting` | atomic files, exact resume, metrics and progress, curves |

Nothing here is needed by `gradconsist` itself, and everything here uses its public API only.
"""
