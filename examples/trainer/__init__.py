"""The parts that the example trainers share: one idea per file, each readable on its own.

| file | what it holds |
| --- | --- |
| `launch`, `cli`, `config`, `config_file`, `option_checks`, `defaults` | the options, their defaults, what is refused |
| `images`, `folder`, `datasets`, `split` | files as upright RGB, in memory or streamed; which are labeled |
| `streams`, `augment`, `randaugment`, `views` | randomness by counter, weak and strong views |
| `loader` | batches by number, a part for each process, and whether a run waits for them |
| `models`, `ema`, `optimizer` | networks, the averaged model, what takes a step |
| `methods` | what is trained: supervised only, FixMatch, FixMatch with GGCR |
| `step`, `training`, `stopping`, `evaluation` | a step, the run, its pauses, the accuracy |
| `weights` | the averaged weights as safetensors, and runs that start from weights |
| `processes` | the processes of a run under torchrun |
| `files`, `rundir`, `checkpoint`, `runlog`, `loggers` | atomic files, exact resume, metrics and progress |
| `runs`, `panels`, `svg`, `page`, `plotting`, `statistics` | run directories read again, and the report |
| `claims`, `grid`, `gridrun`, `tables`, `tabletext` | the paper's tables as a grid of runs, beside its claims |

Nothing here is needed by `gradconsist` itself, and everything here uses its public API only.
"""
