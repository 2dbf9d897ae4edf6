"""The parts that the example trainers share, each readable on its own.

| file | what it holds |
| --- | --- |
| `launch`, `cli`, `config`, `option_checks` | programs, their options and defaults, what is refused |
| `images`, `folder`, `datasets`, `split` | files as upright RGB, in memory or streamed; which are labeled |
| `streams`, `augment` | randomness by counter, weak and strong views |
| `loader` | batches by number, a part for each process, and whether a run waits for them |
| `models`, `methods`, `optimizer` | networks; supervised only, FixMatch, FixMatch with GGCR; what takes a step |
| `step`, `training`, `evaluation` | a step, the run, the accuracy |
| `weights` | the averaged weights as safetensors, and runs that start from weights |
| `processes` | the processes of a run under torchrun |
| `files`, `rundir`, `checkpoint`, `runlog`, `loggers` | atomic files, exact resume, metrics and progress |
| `runs`, `panels`, `page`, `statistics` | run directories read again, and the report |
| `claims`, `grid`, `gridrun`, `tables` | the paper's tables as a grid of runs, beside its claims |

Nothing here is needed by `gradconsist` itself, and everything here uses its public API only.
"""
