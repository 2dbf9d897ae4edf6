"""The parts that the example trainers share: one idea per file, each readable on its own.

| file | what it holds |
| --- | --- |
| `config`, `cli`, `config_file` | the options, their defaults, what a preset changes, what may differ on resume |
| `datasets`, `folder`, `split` | images as one uint8 tensor, the balanced labeled split and its SHA-256 |
| `streams`, `augment`, `operations`, `randaugment` | randomness by counter, weak and strong views |
| `loader`, `waiting` | batches by step number, and whether a run waits for them |
| `models`, `ema`, `schedule` | Wide ResNets, the averaged model, the optimizer and its learning rate |
| `methods` | what is trained: supervised only, FixMatch, FixMatch with GGCR |
| `step`, `training`, `stopping`, `evaluation` | a step, the run, its pauses, the test accuracy |
| `weights` | the averaged weights as safetensors, and runs that start from weights |
| `processes`, `imagenet` | the processes of a run under torchrun; photographs that are decoded when needed |
| `files`, `rundir`, `checkpoint`, `runlog` | atomic files, exact resume, metrics and progress |
| `runs`, `panels`, `svg`, `page`, `plotting`, `statistics` | run directories read again, and the report |
| `claims`, `grid`, `gridrun`, `tables`, `tabletext` | the paper's tables as a grid of runs, beside its claims |

Nothing here is needed by `gradconsist` itself, and everything here uses its public API only.
"""
