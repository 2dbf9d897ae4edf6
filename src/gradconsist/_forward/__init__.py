"""Each sample stands for itself: how the user's model is run so that a per-sample loss is a function of its own sample.

`per_sample` is the forward. In it, `batchnorm` holds statistics constant, `exact_operators` stand in for torch's where
its second derivative is wrong, `remembered` puts back what modules keep. `statistics` takes BatchNorm's joint
statistics, `observer` those of a method's own forward. `sandbox`, `isolation` and `randomness` go around it.
"""
