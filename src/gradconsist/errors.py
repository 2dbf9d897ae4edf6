"""Every error that gradconsist raises on purpose.

All of them derive from `GradConsistError` and from the built-in class that fits, so ``except ValueError`` keeps
working. A message names the argument or the module's path, says what was found, and ends with the remedy.
"""


class GradConsistError(Exception):
    """Base class of the family: catch it to catch everything that this library refuses."""


class ConfigError(GradConsistError, ValueError):
    """An option has a value that it cannot have, alone or beside another option."""


class InputTypeError(GradConsistError, TypeError):
    """A view, target or weight is not a tensor (or a dict, tuple or list of tensors and constants) of a usable kind."""


class InputShapeError(GradConsistError, ValueError):
    """The sizes of views, target and weight do not belong together."""


class InputValueError(GradConsistError, ValueError):
    """A target or a weight has entries outside its range, or two views hold different constants."""


class NonFiniteError(GradConsistError, ValueError):
    """A per-sample gradient is NaN or infinite."""


class DeviceError(GradConsistError, ValueError):
    """Model and inputs are not on one device."""


class GradModeError(GradConsistError, RuntimeError):
    """A loss was asked for where no graph can be built; `measure` works there."""


class ParameterSelectionError(GradConsistError, ValueError):
    """`encoder` selects no trainable parameter, or something that is not part of the model."""


class LossContractError(GradConsistError, ValueError):
    """`loss_fn`, the model's output or a wrapped method does not return what the contract asks for."""


class ModelError(GradConsistError, RuntimeError):
    """The model's forward or `loss_fn` failed with an error of torch's or Python's own, which is the cause."""


class UnsupportedModuleError(GradConsistError, NotImplementedError):
    """A module or operation for which the result could not be exact; the message says what to use instead."""


class StateError(GradConsistError, ValueError):
    """A `state_dict` does not belong to this object."""
