"""What `fixmatch_imagenet.py` has of its own: photographs that are decoded when needed, and several processes.

| file | what it holds |
| --- | --- |
| `config` | the options, as far as they differ from those of the CIFAR trainer |
| `files`, `labels` | the files of a data set, and which of them are labeled |
| `views`, `batches` | weak and strong views of a photograph, batches by step number, a part of each for every process |
| `networks` | torchvision's networks, with the normalisation that was asked for |
| `step`, `start`, `training`, `evaluation` | a step on all processes, the run, the accuracy over all of them |

Everything else is in `trainer`, `trainer.processes` among it.
"""
