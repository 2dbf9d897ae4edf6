"""The plan's 64 bad inputs, each with the class and the message that it gets: argument, finding, remedy.

Where a row is no mistake here, because the input is handled, it says so and is held against the oracle. Rows of the
trainers name the tests that hold them. More forms of most rows, in every engine: test_errors.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from gradconsist import GGCRWrapper, GradientConsistencyLoss
from gradconsist.errors import (
    ConfigError,
    DeviceError,
    GradConsistError,
    GradModeError,
    InputShapeError,
    InputTypeError,
    InputValueError,
    LossContractError,
    ModelError,
    NonFiniteError,
    ParameterSelectionError,
    UnsupportedModuleError,
)
from support import compare, state
from support.changes import poke, put
from support.models import SquareOnce
from support.zoo import CASES, Problem

TESTS = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Bad:
    """A call with one mistake: `change` spoils the arguments of a good one on the zoo's `problem`."""

    number: int
    says: str
    error: type[Exception]
    match: str
    change: Callable[[dict[str, Any]], Any]
    problem: str = "mlp"


@dataclass(frozen=True)
class Refused:
    """Something else that is done with a good problem."""

    number: int
    says: str
    error: type[Exception]
    match: str
    act: Callable[[Problem], Any]
    problem: str = "mlp"


@dataclass(frozen=True)
class Handled:
    """No mistake here; `act` shows the right result."""

    number: int
    says: str
    act: Callable[[Problem], Any]
    problem: str = "mlp"


@dataclass(frozen=True)
class Elsewhere:
    """Of the trainers; the tests that hold it, as "file::test"."""

    number: int
    says: str
    tests: tuple[str, ...]


def _loss(p: Problem, model: nn.Module | None = None, **options: Any) -> Tensor:
    return GradientConsistencyLoss(p.model if model is None else model, **options)(*p.views)


def _with(p: Problem, function: Callable[[nn.Linear, Tensor], Any], **options: Any) -> Tensor:
    """The loss of a model that does something between two layers."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(5, 6).double(), nn.Linear(6, 3).double()

        def forward(self, x: Tensor) -> Any:
            return function(self.head, self.stem(x))

    with torch.random.fork_rng(devices=[]):
        model = Model()
    return _loss(p, model, **options)


def _exact(p: Problem, **options: Any) -> None:
    for engine in ("auto", "loop", "vmap", "ghost"):
        gc = GradientConsistencyLoss(p.model, engine=engine, **options)
        loss = gc(*p.views)
        compare.assert_agrees(
            gc.last, loss, compare.gradient_of(loss, p.model), p.judge().verdict(), dtype=torch.float64
        )


def _nan_parameter(p: Problem) -> None:
    with torch.no_grad():
        p.model[2].weight[0, 0] = torch.nan
    _loss(p)


def _weights_zero(p: Problem) -> None:
    loss = GradientConsistencyLoss(p.model)(*p.views, torch.zeros(5))
    assert float(loss.detach()) == 0.0
    assert not compare.gradient_of(loss, p.model).any()


def _split(p: Problem) -> None:
    p.model[4].to("meta")
    _loss(p)


def _under(mode: Any) -> Callable[[Problem], None]:
    def act(p: Problem) -> None:
        with mode(), pytest.raises(GradModeError, match=rf"{mode.__name__}.*measure"):
            GradientConsistencyLoss(p.model, fused=False)(*p.views)
        gc = GradientConsistencyLoss(p.model)
        with mode():
            gc(*p.views)

    return act


def _twice(p: Problem) -> None:
    """Naming a module twice is naming it: a set, and no factor of 2."""
    once, twice = (_loss(p, encoder=[p.model[0]] * n) for n in (1, 2))
    assert torch.equal(compare.gradient_of(once, p.model), compare.gradient_of(twice, p.model))


def _ddp(p: Problem) -> None:
    distributed = pytest.importorskip("torch.distributed")
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        _loss(p, nn.parallel.DistributedDataParallel(p.model))
    finally:
        distributed.destroy_process_group()


def _fsdp(p: Problem) -> None:
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        _loss(p, fully_shard(p.model, mesh=init_device_mesh("cpu", (1,))))
    finally:
        distributed.destroy_process_group()


def _flash_only(p: Problem) -> None:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        _exact(p)


class _Overwriting(nn.Module):
    """Overwrites what its first layer was given, which no gradient of an output needs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = x.clone()
        y = self.stem(z)
        z.mul_(0.5)
        return self.head(torch.tanh(y))


def _overwritten(p: Problem) -> None:
    with torch.random.fork_rng(devices=[]):
        model = _Overwriting().double()
    for engine in ("loop", "vmap"):
        with pytest.raises(UnsupportedModuleError, match=r"inplace=False.*modified by an inplace operation"):
            _loss(p, model, engine=engine)
    _loss(p, model, engine="ghost")


def _wrap(p: Problem, **options: Any) -> None:
    GGCRWrapper(lambda: None, GradientConsistencyLoss(p.model), **options)


def _bag(p: Problem) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.EmbeddingBag(9, 5), nn.Linear(5, 3))
    return _loss(p, model)


_NAN, _INF = float("nan"), float("inf")

TABLE: list[Bad | Refused | Handled | Elsewhere] = [
    # Tensors
    Bad(1, "views of different sizes", InputShapeError, "`weak` has 5 .*`strong` 3: row", put(strong=lambda x: x[:3])),
    Bad(2, "wrong channels", ModelError,
        r"`weak` and `strong` .*\(5, 2, 6, 6\)\) in `model\.0` \(Conv2d\): .*but got 2.* in_channels=3",
        put(weak=lambda x: x[:, :2], strong=lambda x: x[:, :2]), "cnn_batchnorm_train"),
    Bad(3, "no samples", InputShapeError, "`weak` .*empty",
        put(weak=lambda x: x[:0], strong=lambda x: x[:0], target=lambda t: t[:0])),
    Bad(4, "a scalar view", InputShapeError, "`weak` .*batch", put(weak=torch.tensor(1.0))),
    Bad(5, "few labels", InputShapeError, r"`target` has shape \(4,\), but there are 5 pairs: .*row",
        put(target=lambda t: t[:4])),
    Bad(6, "float labels", InputTypeError, "`target` is torch.float64.*must be integers",
        put(target=lambda t: t.double())),
    Bad(7, "label = C", InputValueError, r"`target` has class 3, the model has 3 .*0 to 2", poke("target", 2, 3)),
    Bad(8, "a negative label", InputValueError, "`target` has the negative class -1: give", poke("target", 2, -1)),
    Bad(9, "soft labels that do not sum to 1", InputValueError, "`target` rows are not prob.*softmax",
        put(target=lambda t: 2 * t), "mlp_soft_target"),
    Bad(10, "a negative soft label", InputValueError, "`target` rows are not prob.*softmax",
        poke("target", (0, 0), -0.5), "mlp_soft_target"),
    Bad(11, "integer images", InputTypeError, "`weak` is uint8: convert", put(weak=lambda x: x.to(torch.uint8))),
    Bad(12, "a complex view", InputTypeError, "`weak` is a complex .*pass an ord",
        put(weak=lambda x: x.to(torch.complex64))),
    Bad(13, "a sparse view", InputTypeError, "`weak` is a torch.sparse.* pass", put(weak=lambda x: x.to_sparse())),
    Bad(14, "a quantised view", InputTypeError, "`strong` is a quantized .*pass an ord",
        put(strong=lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8))),
    Bad(15, "a list of rows", InputTypeError, "`weak` and `strong` are built diff.*same", put(weak=lambda x: list(x))),
    Bad(16, "no tensor", InputTypeError, r"`weak` is a ndarray.*torch\.from_numpy", put(weak=lambda x: x.numpy())),
    Bad(17, "no view", InputTypeError, "`strong` is a NoneType, not a tensor: pass", put(strong=None)),
    Bad(18, "a nested view", InputTypeError, "`weak` is a nested tensor: pass an ord",
        put(weak=lambda x: torch.nested.nested_tensor(list(x)))),
    Bad(19, "NaN in a view", NonFiniteError, "1 of 5 pairs.*`weak` has such.*Skip", poke("weak", (1, 0), _NAN)),
    Bad(20, "inf in a view", NonFiniteError, "1 of 5 pairs.*`strong` has such.*Skip", poke("strong", (1, 0), _INF)),
    Bad(21, "NaN in a label", NonFiniteError, "`target` has NaN.*pass", poke("target", (0, 0), _NAN),
        "mlp_soft_target"),
    Refused(22, "NaN in a parameter", NonFiniteError, r"'2\.weight' of `model` has such.*Skip", _nan_parameter),
    Bad(23, "negative weights", InputValueError, "`weight` has the negative entry -1: p", put(weight=-torch.ones(5))),
    Handled(24, "all weights zero: a zero with a graph", _weights_zero),
    Bad(25, "a view elsewhere", DeviceError, "`weak` is on meta, .*cpu: move", put(weak=lambda x: x.to("meta"))),
    Refused(26, "a model on two devices", DeviceError, r"\['cpu', 'meta'\]: move them to one device", _split),
    Refused(27, "meta tensors", DeviceError, r"`model` is on the meta.*to_empty",
        lambda p: _loss(p, p.model.to("meta"))),
    # Grad mode and selection
    Refused(28, "no_grad", GradModeError, r"called under no_grad.*`measure", _under(torch.no_grad)),
    Refused(29, "inference_mode", GradModeError, r"under inference_mode.*`measure", _under(torch.inference_mode)),
    Refused(30, "all frozen", ParameterSelectionError,
        r"`model` \(Sequential\) has no parameter with requires_grad.*unfreeze",
        lambda p: _loss(p, p.model.requires_grad_(False))),
    Refused(31, "a predicate that matches nothing", ParameterSelectionError,
        "`encoder` selects none of the 6 .*check the names",
        lambda p: _loss(p, encoder=lambda name: name.startswith("body."))),
    Refused(32, "tensors (not leaves) for modules", ParameterSelectionError,
        r"`encoder\[0\]` is a Tensor, not a module: pass modules", lambda p: _loss(p, encoder=[2 * p.model[0].weight])),
    Handled(33, "a module named twice", _twice),
    Refused(34, "a detached loss", LossContractError, "has no graph: `loss_fn` .*detaches.*Return",
        lambda p: _loss(p, loss_fn=lambda z, t: F.cross_entropy(z.detach(), t, reduction="none"))),
    Refused(35, "a reduced loss", LossContractError, r"`loss_fn` returned a tensor of shape \(\).*reduction='none'",
        lambda p: _loss(p, loss_fn=F.cross_entropy)),
    Refused(36, "a loss of another shape", LossContractError,
        r"`loss_fn` returned a tensor of shape \(1, 3\).*reduction='none'", lambda p: _loss(p, loss_fn=lambda z, t: z)),
    # Modules
    Handled(37, "BatchNorm in train mode", _exact, "cnn_batchnorm_train"),
    Handled(38, "SyncBatchNorm in one process (among several: test_hazards)", _exact, "cnn_sync_batchnorm_train"),
    Handled(39, "InstanceNorm that tracks statistics", _exact, "cnn_instancenorm_tracking"),
    Handled(40, "a compiled model (test_isolation)", lambda p: _loss(p, torch.compile(p.model, backend="eager"))),
    Refused(41, "a scripted model", UnsupportedModuleError, "`model` is a .*ScriptModule.*pass the Python module",
        lambda p: _loss(p, torch.jit.trace(p.model, p.weak))),
    Refused(42, "FSDP", UnsupportedModuleError, "`model` is sharded by FSDP.*use DistributedDataParallel", _fsdp),
    Refused(43, "raw DDP", UnsupportedModuleError, r"`model` is a Distrib.*ddp\.module.*DDP\(GGCRWrapper", _ddp),
    Refused(44, "DataParallel", UnsupportedModuleError,
        r"`model` is a DataParallel: pass the inner model \(`\.module`\)",
        lambda p: _loss(p, nn.DataParallel(p.model))),
    Refused(45, "a lazy module", UnsupportedModuleError,
        r"`model\.0` has uninitialized \(lazy\) parameters: run one forward",
        lambda p: _loss(p, nn.Sequential(nn.LazyLinear(3)))),
    Refused(46, "a reentrant checkpoint", UnsupportedModuleError, "uses reentrant checkpointing.*use_reentrant=False",
        lambda p: _with(p, lambda head, y: checkpoint(head, y, use_reentrant=True))),
    Refused(47, "EmbeddingBag", UnsupportedModuleError, r"`model\.0` is an EmbeddingBag.*use Embedding", _bag,
        "tied_embedding"),
    Handled(48, "attention where only flash is allowed", _flash_only, "attention_functional"),
    Refused(49, "an output without logits", LossContractError,
        r"output is a dict \('scores': tensor \[1, 3\], 'all': tuple\), not logits.*pass `loss_fn=",
        lambda p: _with(p, lambda head, y: {"scores": head(y), "all": (y, None)})),
    Refused(50, "a function without a second derivative", UnsupportedModuleError,
        "(?s)once_differentiable.*differentiable operations",
        lambda p: _with(p, lambda head, y: head(SquareOnce.apply(y)), engine="loop")),
    Refused(51, "a layer's input is overwritten", UnsupportedModuleError, r"stem\.weight.*overwritten.*inplace=False",
        _overwritten),
    Handled(52, "parameters of no layer with a rule", _exact, "bare_parameters"),
    # Options
    Refused(53, "a negative lambda", ConfigError, "`weight` is -0.1: give .*least 0", lambda p: _wrap(p, weight=-0.1)),
    Refused(54, "lambda is NaN", ConfigError, "`weight` is nan: give a finite number", lambda p: _wrap(p, weight=_NAN)),
    Refused(55, "a bound of 0", ConfigError, "`min_norm` is 0.0: give .*1e-18", lambda p: _loss(p, min_norm=0.0)),
    Refused(56, "a chunk of 2.5", ConfigError, "`chunk_size` is 2.5: give an int", lambda p: _loss(p, chunk_size=2.5)),
    Refused(57, "a projection that is a number", ConfigError, r"`projection` is 0: pass RandomProjection\(dim",
        lambda p: _loss(p, projection=0)),
    Refused(58, "an unknown engine", ConfigError, "'lop': choose.*mean 'loop'", lambda p: _loss(p, engine="lop")),
    Elsewhere(59, "an unknown option", ("examples/test_options.py::test_a_wrong_command_line_ends_with_status_2",)),
    Elsewhere(60, "a configuration that would run code (options are a command line, runs are JSON: there is no YAML)",
        ("examples/test_hostile_files.py::test_a_config_of_another_form_is_refused",)),
    Elsewhere(61, "a long warm-up", ("examples/test_training.py::test_a_term_that_can_never_act_is_said",)),
    Elsewhere(62, "an EMA decay outside [0, 1)",
        ("examples/test_options.py::test_impossible_options_are_refused_before_anything_is_written",)),
    # Files
    Elsewhere(63, "a run that is missing, another's, or a foreign pickle",
        ("examples/test_hostile_files.py::test_a_forged_pickle_is_refused_and_runs_nothing",
        "examples/test_hostile_files.py::test_a_whole_checkpoint_of_something_else_is_refused",
        "examples/test_hostile_files.py::test_a_run_file_that_is_no_file_or_lost_is_refused")),
    Elsewhere(64, "a data set of another layout", ("examples/test_folder.py::test_missing_folder_is_refused",
        "examples/test_folder.py::test_wrong_layout_says_what_was_found")),
]  # fmt: skip


def _rows(kind: type) -> Any:
    rows = [row for row in TABLE if isinstance(row, kind)]
    return pytest.mark.parametrize("row", rows, ids=[f"{row.number} {row.says}" for row in rows])


def _snapshot(p: Problem) -> dict[str, Any]:
    return {**state.of_process(), **state.of_model(p.model)}


def test_the_table_has_all_64_rows_once(record_testsuite_property: Callable[[str, object], None]) -> None:
    assert [row.number for row in TABLE] == list(range(1, 65))
    counts = {kind.__name__: sum(isinstance(row, kind) for row in TABLE) for kind in (Bad, Refused, Handled, Elsewhere)}
    assert counts == {"Bad": 23, "Refused": 27, "Handled": 8, "Elsewhere": 6}
    record_testsuite_property("bad_inputs", f"{len(TABLE)} of 64: {counts}")


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning", "ignore:.*nested tensors:UserWarning")
@_rows(Bad)
def test_bad_calls(row: Bad) -> None:
    p = CASES[row.problem].problem()
    arguments: dict[str, Any] = {"weak": p.weak, "strong": p.strong, "target": p.target}
    row.change(arguments)
    before = _snapshot(p)
    gc = GradientConsistencyLoss(p.model)
    for call in (gc, gc.measure):
        with pytest.raises(row.error, match=row.match) as caught:
            call(**arguments)
        assert issubclass(row.error, GradConsistError)
        assert len(str(caught.value)) < 500
        assert "tensor(" not in str(caught.value)
    assert state.differences(before, _snapshot(p)) == []


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*", "ignore::FutureWarning", "ignore:None of the inputs have requires_grad"
)
@_rows(Refused)
def test_refusals(row: Refused) -> None:
    p = CASES[row.problem].problem()
    before = state.of_process()
    with pytest.raises(row.error, match=row.match):
        row.act(p)
    assert state.differences(before, state.of_process()) == []


@_rows(Handled)
def test_handled(row: Handled) -> None:
    row.act(CASES[row.problem].problem())


@_rows(Elsewhere)
def test_tests_of_the_trainers_exist(row: Elsewhere) -> None:
    for address in row.tests:
        file, name = address.split("::")
        if not (TESTS / file).exists():
            pytest.skip("the trainers' tests are not here")
        found = {
            node.name for node in ast.walk(ast.parse((TESTS / file).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert name in found, address
