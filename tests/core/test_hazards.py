"""What is handled, or refused by name, in every engine. Threads, compiled code and checkpoints: test_isolation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradconsist import GGCRWrapper, GradientConsistencyLoss, StepOutput, ViewPair
from gradconsist.errors import InputTypeError, ParameterSelectionError, UnsupportedModuleError
from support import compare, state
from support.models import Layers
from support.nets import Net, assert_exact, net, views
from support.oracle import judge

DOUBLE = torch.float64
ENGINES = pytest.mark.parametrize("engine", ["auto", "loop", "vmap", "ghost"])
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "graph"])

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore:There is a performance drop")


def assert_refused(build: Callable[[], nn.Module], engine: str, match: str) -> None:
    model = build()
    with pytest.raises(UnsupportedModuleError, match=match):
        GradientConsistencyLoss(model, engine=engine)(*views())


# -- scripts, and functions called past their Python form --------------------------------------------------------------


def _tanh(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return 2 * torch.tanh(x) * w + b


def _layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.layer_norm(x, [6], w, b, 1e-5)


def _instance_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = torch.instance_norm(x.unsqueeze(2) * b.cumsum(0)[:4], w, b, None, None, True, 0.1, 1e-5, False)
    return y[:, :, 0] - 0.5 * y[:, :, 1].tanh()


def _weight_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, torch._weight_norm(torch.outer(w, b) + torch.diag(b), w[:, None], 0))


def _batch_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.batch_norm(x, w, b, None, None, True, 0.1, 1e-5, False)


def _dropout(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.dropout(x, 0.5, True) * w + b


def _native_layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.ops.aten.native_layer_norm(x, [6], w, b, 1e-5)[0]


def _weight_norm_interface(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, torch._weight_norm_interface(torch.outer(w, b) + torch.diag(b), w[:, None], 0)[0])


#: What no function mode sees into, by what it computes.
BELOW = {
    **{f.__name__[1:]: f for f in (_tanh, _layer_norm, _instance_norm, _weight_norm, _batch_norm, _dropout)},
    "native_layer_norm": _layer_norm,
    "weight_norm_interface": _weight_norm,
}
OPERATORS = {"native_layer_norm": _native_layer_norm, "weight_norm_interface": _weight_norm_interface}


def _applied(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Net:
    return net(lambda net, x: torch.tanh(function(torch.tanh(net.stem(x)), net.gain, net.shift)))


LAYER_NORM = r"torch's LayerNorm.*wrong under vmap.*'auto'"
BELOW_REFUSED = {
    ("layer_norm", "vmap"): LAYER_NORM,
    ("native_layer_norm", "vmap"): LAYER_NORM,
    ("instance_norm", "vmap"): r"torch's InstanceNorm.*wrong under vmap.*'auto'",
    **{
        (name, engine): match
        for engine in ("auto", "loop", "vmap", "ghost")
        for name, match in {
            "weight_norm": "weight_norm.*parametrizations", "weight_norm_interface": r"weight_norm .* write v \* \(g",
            "batch_norm": "other samples", "dropout": "random numbers",
        }.items()
    },
}  # fmt: skip


@ENGINES
@pytest.mark.parametrize("name", BELOW)
def test_scripted_functions_and_operators_are_exact_or_refused(name: str, engine: str) -> None:
    """What would need replacing is found in the graph, or by its effect."""
    model = _applied(OPERATORS[name] if name in OPERATORS else torch.jit.script(BELOW[name]))
    match = BELOW_REFUSED.get((name, engine))
    if match is None:
        assert_exact(model, engine, _applied(BELOW[name]))
        return
    assert_refused(lambda: model, engine, match)
    if "wrong under vmap" in match:
        GradientConsistencyLoss(model, engine=engine).measure(*views())  # the first derivative is right


def _by_hand(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    v = torch.outer(w, b) + torch.diag(b)
    return F.linear(x, v * (w[:, None] / v.square().sum(1, keepdim=True).sqrt()))


def _ids(x: Tensor) -> Tensor:
    return (3 + 3 * x.detach()).long().clamp(0, 5)


def _table_by_hand(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    table = torch.outer(w, b)
    return torch.where(_ids(x).unsqueeze(2) == 4, table.detach()[_ids(x)], table[_ids(x)]).sum(1) * x


def _column_by_hand(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.stack([x[:, :2] * w[:2], (x * b)[:, :2], x[:, 2:4] * w[2:4]], 2).flatten(1).sin()


ATEN: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "layer_norm": (lambda x, w, b: torch.ops.aten.layer_norm.default(x, [6], w, b), _layer_norm),
    "layer_norm packet": (lambda x, w, b: torch.ops.aten.layer_norm(x, [6], w, b), _layer_norm),
    "weight_norm": (
        lambda x, w, b: F.linear(x, torch.ops.aten._weight_norm.default(torch.outer(w, b) + torch.diag(b), w[:, None])),
        _by_hand,
    ),
    "dropout": (lambda x, w, b: torch.ops.aten.dropout.default(x, 0.5, True) * w + b, lambda x, w, b: x * w + b),
    "padding of a computed table": (
        lambda x, w, b: F.embedding(_ids(x), torch.outer(w, b), padding_idx=-2).sum(1) * x,
        _table_by_hand,
    ),
    "torch.embedding": (lambda x, w, b: torch.embedding(torch.outer(w, b), _ids(x), 4).sum(1) * x, _table_by_hand),
    "embedding": (
        lambda x, w, b: torch.ops.aten.embedding.default(torch.outer(w, b), _ids(x), 4).sum(1) * x,
        _table_by_hand,
    ),
    "select_scatter": (
        lambda x, w, b: (
            torch.select_scatter(
                torch.stack([x[:, :2] * w[:2], x[:, :2], x[:, 2:4] * w[2:4]], 2), (x * b)[:, :2], 2, -2
            )
            .flatten(1)
            .sin()
        ),
        _column_by_hand,
    ),
    "eval batch_norm": (
        lambda x, w, b: torch.ops.aten.batch_norm.default(x, w, b, b.detach(), w.detach(), False, 0.1, 1e-5, False),
        lambda x, w, b: (x - b.detach()) / (w.detach() + 1e-5).sqrt() * w + b,
    ),
}


@ENGINES
@pytest.mark.parametrize("name", ATEN)
def test_operators_as_an_exported_model_calls_them(name: str, engine: str) -> None:
    function, reference = ATEN[name]
    assert_exact(_applied(function), engine, _applied(reference))


@ENGINES
def test_batch_statistics_as_an_exported_model_asks_for_them(engine: str) -> None:
    model = _applied(lambda x, w, b: torch.ops.aten.batch_norm.default(x, w, b, None, None, True, 0.1, 1e-5, False))
    reference = net(lambda net, x: torch.tanh(net.norm(torch.tanh(net.stem(x)))), norm=nn.BatchNorm1d(6).double())
    with torch.no_grad():
        reference.norm.weight.copy_(reference.gain)
        reference.norm.bias.copy_(reference.shift)
    verdict = judge(reference, *views())
    found = GradientConsistencyLoss(model, engine=engine).measure(*views())
    assert compare.cosine_error(found.cosine, verdict.cosine) <= 1e-10


@ENGINES
@pytest.mark.parametrize("kind", ["scripted", "traced"])
@pytest.mark.parametrize("where", ["model", "part"])
def test_script_modules(kind: str, where: str, engine: str) -> None:
    def build() -> nn.Module:
        plain = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        part = plain if where == "model" else plain[0]
        made = torch.jit.script(part) if kind == "scripted" else torch.jit.trace(part, views()[0])
        return made if where == "model" else nn.Sequential(made, nn.Tanh(), nn.Linear(6, 3).double())

    assert_refused(build, engine, r"`model(\.0)?` is a .*Module: a scripted or traced module.*pass the Python module")


# -- several devices and processes -------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[Any]:
    """A process group of one."""
    distributed = pytest.importorskip("torch.distributed")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield distributed
    distributed.destroy_process_group()


def _fsdp1(part: str, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), **options)
    return {"whole": model, "inside": model.module, "part": nn.Sequential(model)}[part]


def _fsdp2(part: str) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model if part == "whole" else model.stem, mesh=init_device_mesh("cpu", (1,)))
    return model


def _tensor_parallel() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = net()
    parallelize_module(model, init_device_mesh("cpu", (1,)), {"stem": ColwiseParallel(), "head": RowwiseParallel()})
    return model


def _replicated() -> nn.Module:
    from torch.distributed._composable.replicate import replicate

    return replicate(net())


PARALLEL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "DataParallel": (lambda: nn.DataParallel(net()), r"`model` is a DataParallel.*\.module"),
    "DataParallel inside": (lambda: nn.Sequential(nn.DataParallel(net())), r"`model\.0` is a DataParallel"),
    "DDP": (lambda: nn.parallel.DistributedDataParallel(net()), r"ddp\.module.*DDP\(GGCRWrapper"),
    "DDP inside": (lambda: nn.Sequential(nn.parallel.DistributedDataParallel(net())), r"`model\.0` is a Distributed"),
    "replicate": (_replicated, r"replicated in place.*DDP\(GGCRWrapper"),
    "FSDP1": (lambda: _fsdp1("whole"), "FSDP does not support double backward.*DistributedDataParallel"),
    "FSDP1 part": (lambda: _fsdp1("part"), r"`model\.0` is a FullySharded.*DistributedDataParallel"),
    "FSDP1 inside": (lambda: _fsdp1("inside"), "sharded by FSDP.*DistributedDataParallel"),
    "FSDP1 inside, names kept": (lambda: _fsdp1("inside", use_orig_params=True), "sharded by FSDP"),
    "FSDP2": (lambda: _fsdp2("whole"), "`model` is sharded by FSDP.*DistributedDataParallel"),
    "FSDP2 part": (lambda: _fsdp2("part"), r"`model\.stem` is sharded by FSDP"),
    "tensor parallel": (_tensor_parallel, r"`model\.stem` has the parameter 'weight' of type DTensor.*plain"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # what these wrappers say of themselves
@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_models_are_refused_by_name(one_process: Any, name: str) -> None:
    build, match = PARALLEL[name]
    model = build()
    for engine in ("auto", "loop", "vmap", "ghost"):
        assert_refused(lambda: model, engine, match)


@pytest.mark.usefixtures("one_process")
def test_the_inner_model_of_ddp_is_compared_as_it_is() -> None:
    inner = nn.parallel.DistributedDataParallel(net()).module
    assert_exact(inner, "auto")


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")  # torch 2.6, of its own distribute_tensor
def test_distributed_inputs_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    weak, strong, target = views()
    mesh = init_device_mesh("cpu", (1,))
    with pytest.raises(InputTypeError, match="`weak` is of type DTensor: pass an ordinary"):
        GradientConsistencyLoss(net())(distribute_tensor(weak, mesh, [Replicate()]), strong, target)


@ENGINES
def test_sync_batchnorm_among_processes(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(lambda net, x: torch.tanh(net.norm(net.stem(x))), norm=nn.SyncBatchNorm(6))
    monkeypatch.setattr("gradconsist._refusals.models.process_count", lambda: 2)
    assert_refused(lambda: model, engine, r"`model\.norm` is a SyncBatchNorm in train mode among 2.*eval mode")
    model.norm.eval()
    assert_exact(model, engine)


# -- attention, recurrence, in-place activations -----------------------------------------------------------------------


def _attend(net: Any, x: Tensor) -> Tensor:
    q, k, v = (torch.tanh(net.stem(x) * scale).view(-1, 1, 3, 2) for scale in (1.0, 2.0, 3.0))
    return F.scaled_dot_product_attention(q, k, v).flatten(1)


@ENGINES
@pytest.mark.parametrize("allowed", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], ids=["flash", "eff"])
def test_attention_where_only_a_fused_kernel_is_allowed(allowed: Any, engine: str) -> None:
    with sdpa_kernel(allowed):
        assert_exact(net(_attend), engine, fused=engine != "loop")
        flags = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())
    assert flags == (allowed == SDPBackend.FLASH_ATTENTION, False)


@ENGINES
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_kernels_that_cannot_be_differentiated_twice_are_off_meanwhile(kind: Any, engine: str) -> None:
    """On this CPU: mkldnn's. cuDNN's flag is seen to be off; that its kernels then stay away needs a GPU."""
    seen: list[tuple[bool, bool]] = []

    def recur(net: Any, x: Tensor) -> Tensor:
        seen.append((torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled))
        return net.rnn(torch.tanh(net.stem(x)).view(-1, 3, 2))[0][:, -1]

    model = net(recur, rnn=kind(2, 6, batch_first=True))
    try:
        GradientConsistencyLoss(model, engine=engine)(*views()).backward()
    except UnsupportedModuleError as error:
        assert engine == "vmap"
        assert "engine='loop'" in str(error)  # noqa: PT017
    assert set(seen) == {(False, False)}
    assert (torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled) == (True, True)


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_": lambda y: F.relu_(y),
    "leaky_relu": lambda y: F.leaky_relu(y, 0.2, inplace=True),
    "elu": lambda y: F.elu(y, inplace=True),
    "silu": lambda y: F.silu(y, inplace=True),
    "hardtanh": lambda y: F.hardtanh(y, -0.7, 0.7, inplace=True),
    "tanh_": lambda y: y.tanh_(),
    "mul_": lambda y: y.mul_(0.7).tanh(),
    "add_": lambda y: y.add_(0.3).tanh(),
    "masked": lambda y: y.masked_fill_(y.detach() < 0, 0.3),
}


@ENGINES
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_activations(name: str, engine: str) -> None:
    assert_exact(net(lambda net, x: IN_PLACE[name](net.stem(x))), engine)


# -- hooks and parametrised weights ------------------------------------------------------------------------------------


def _double(gradient: Any) -> Any:
    return tuple(None if g is None else 2 * g for g in gradient)


HOOKS: dict[str, Callable[[Net], Any]] = {
    "forward": lambda net: net.stem.register_forward_hook(lambda m, i, o: 1.5 * o),
    "forward, kwargs": lambda net: net.stem.register_forward_hook(lambda m, i, k, o: 1.5 * o, with_kwargs=True),
    "forward pre": lambda net: net.head.register_forward_pre_hook(lambda m, i: (i[0] + 0.1,)),
    "of the model": lambda net: net.register_forward_hook(lambda m, i, o: 1.5 * o),
    "full backward, seeing": lambda net: net.stem.register_full_backward_hook(lambda m, i, o: None),
    "full backward, changing": lambda net: net.head.register_full_backward_hook(lambda m, i, o: _double(i)),
    "full backward pre": lambda net: net.stem.register_full_backward_pre_hook(lambda m, o: _double(o)),
    "tensor hook": lambda net: net.stem.register_forward_hook(lambda m, i, o: _hooked(o)),
    "old backward": lambda net: net.stem.register_backward_hook(lambda m, i, o: _double(i)),
    "node, before": lambda net: net.stem.register_forward_hook(lambda m, i, o: _node(o, "register_prehook")),
    "node, after": lambda net: net.stem.register_forward_hook(lambda m, i, o: _node(o, "register_hook")),
    "several tensors": lambda net: net.stem.register_forward_hook(lambda m, i, o: _several(o)),
}


def _hooked(y: Tensor) -> None:
    if y.requires_grad:
        y.register_hook(lambda g: 2 * g)


def _node(y: Tensor, register: str) -> None:
    if y.grad_fn is not None:
        getattr(y.grad_fn, register)(lambda g, *_: _double(g))


def _several(y: Tensor) -> None:
    if y.requires_grad:
        torch.autograd.graph.register_multi_grad_hook((y,), lambda gradients: None)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@ENGINES
@pytest.mark.parametrize("name", HOOKS)
def test_user_hooks(name: str, engine: str) -> None:
    """What changes a gradient on its way does so in the per-sample gradient, and in its derivative."""
    model = net()
    HOOKS[name](model)
    backward = name.startswith(("full", "tensor", "old", "node", "several"))
    if backward and engine in ("vmap", "ghost"):
        assert_refused(lambda: model, engine, "engine='loop'")
    else:
        assert_exact(model, engine, fused=engine == "auto")


@ENGINES
def test_hooks_after_accumulation_run_once_in_the_users_backward(engine: str) -> None:
    model, calls = net(), []
    model.stem.weight.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    loss = GradientConsistencyLoss(model, engine=engine)(*views())
    assert calls == []
    loss.backward()
    assert len(calls) == 1


def _settled(model: Net) -> Net:
    """As the next forward in train mode would leave it: one power iteration, then constant."""
    model(views()[0])
    return model.eval()


NORMED: dict[str, Callable[[], Net]] = {
    "spectral_norm": lambda: _with_stem(nn.utils.parametrizations.spectral_norm),
    "spectral_norm by hook": lambda: _with_stem(nn.utils.spectral_norm),
    "orthogonal": lambda: _with_stem(nn.utils.parametrizations.orthogonal),
}


def _with_stem(change: Callable[[nn.Module], nn.Module]) -> Net:
    model = net()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        change(model.stem)
    return model


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@ENGINES
@pytest.mark.parametrize("name", NORMED)
def test_parametrised_weights_in_train_mode(name: str, engine: str) -> None:
    """Constants of the next forward, for all samples; weight_norm: test_exactness, and both of its forms there."""
    model = NORMED[name]()
    before = state.snapshot(model)
    try:
        gc = GradientConsistencyLoss(model, engine=engine)
        loss = gc(*views())
    except UnsupportedModuleError as error:
        assert engine in ("vmap", "ghost")
        assert "engine='loop'" in str(error)  # noqa: PT017
        return
    assert state.differences(before, state.snapshot(model)) == []
    reference = _settled(NORMED[name]())
    parameters = [p for p in reference.parameters() if p.requires_grad]
    # No copy: what the old hook computes is no leaf.
    expected = _definition(reference, parameters)
    found = compare.gradient_of(loss, model)
    assert abs(float(loss.detach()) - float(expected[0])) <= 1e-10
    assert compare.relative(found, expected[1]) <= 1e-8


def _definition(model: nn.Module, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """L_g and its gradient by the definition, a sample at a time."""
    terms = []
    for w, s, t in zip(*views(), strict=True):
        g = [
            torch.cat(
                [
                    p.flatten()
                    for p in torch.autograd.grad(
                        F.cross_entropy(model(x[None]), t[None]), parameters, create_graph=True, materialize_grads=True
                    )
                ]
            )
            for x in (w, s)
        ]
        terms.append(1 - g[0] @ g[1] / (g[0].norm() * g[1].norm()))
    loss = torch.stack(terms).mean()
    gradient = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return loss.detach(), torch.cat([g.flatten() for g in gradient])


# -- kinds of numbers, and modes they were made in ---------------------------------------------------------------------


class _Image(torch.Tensor):
    """As torchvision's tv_tensors: a subclass that operations keep."""


@ENGINES
def test_views_of_a_subclass(engine: str) -> None:
    weak, strong, target = views()
    verdict = judge(net(), weak, strong, target)
    gc = GradientConsistencyLoss(net(), engine=engine)
    compare.assert_exact(gc, (weak.as_subclass(_Image), strong.as_subclass(_Image), target), verdict)


@ENGINES
def test_complex_parameters(engine: str) -> None:
    """Refused where compared: a product of complex gradients has no sign to agree in."""
    model = net(lambda net, x: (net.stem(x).to(torch.complex128) * net.phase).real.tanh())
    model.phase = nn.Parameter(torch.randn(6, dtype=torch.complex128))
    with pytest.raises(ParameterSelectionError, match=r"'phase' is torch.complex128.*real and imaginary"):
        GradientConsistencyLoss(model, engine=engine)
    GradientConsistencyLoss(model, engine=engine, encoder=model.stem)(*views()).backward()
    assert model.phase.grad is not None


@ENGINES
@pytest.mark.parametrize("wide", ["stem", "head"])
def test_parameters_of_two_dtypes(wide: str, engine: str) -> None:
    """The widest counts: sums in float64, differences as float32 allows."""
    if wide == "head":
        model = net(lambda net, x: torch.tanh(net.stem(x.float())).double())
        model.stem.float()
    else:
        model = net(lambda net, x: torch.tanh(net.stem(x)).float())
        model.head.float()
    verdict = judge(net(), *views())
    gc = GradientConsistencyLoss(model, engine=engine, encoder=lambda name: name.startswith(("stem", "head")))
    loss = gc(*views())
    assert loss.dtype == torch.float64
    assert compare.cosine_error(gc.last.cosine, verdict.cosine) <= 2e-5
    assert compare.relative(compare.gradient_of(loss, model), verdict.flat) <= 2e-4


@ENGINES
def test_parameters_made_in_inference_mode(engine: str) -> None:
    """With vmap their gradient would be zero, in silence."""
    with torch.inference_mode():
        model = net()
    with pytest.raises(UnsupportedModuleError, match=r"'(gain|weight)' made under torch.inference_mode.*outside"):
        GradientConsistencyLoss(model, engine=engine)(*views())
    model = net(lambda net, x: torch.tanh(net.stem(x + net.constant)))
    with torch.inference_mode():
        model.constant = torch.ones(5, dtype=DOUBLE)
    assert_exact(model, engine)
    model.stem = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 6)).double()
    model.function = lambda net, x: torch.tanh(net.stem[1](net.stem[0](x) * net.constant))
    assert_exact(model, engine)  # attributes are lent as copies, which can be saved for a derivative
    constant = model.constant
    model.function = lambda net, x: torch.tanh(net.stem[1](net.stem[0](x) * constant))
    assert_refused(lambda: model, engine, "made under torch.inference_mode.*clone of it as a buffer")


@ENGINES
def test_buffers_frozen_parameters_and_arguments_made_in_inference_mode(engine: str) -> None:
    model = net(lambda net, x: torch.tanh(net.norm(net.stem(net.frozen(x)))), norm=nn.BatchNorm1d(6))
    with torch.inference_mode():
        model.frozen = nn.Linear(5, 5).double().requires_grad_(False)
        model.norm.running_mean, model.norm.running_var = torch.rand(6).double(), 0.5 + torch.rand(6).double()
        weight = torch.ones(4)
        made = [view.clone() for view in views()]
    model.norm.eval()
    gc = GradientConsistencyLoss(model, engine=engine)
    expected = gc(*views())
    loss = gc(*made, weight)
    assert torch.equal(loss, expected)
    loss.backward()
    with torch.inference_mode():
        assert torch.equal(gc.measure(*made).cosine, gc.measure(*views()).cosine)


def test_autocast_with_a_teacher_and_a_student() -> None:
    """A cast that was cached under no_grad has no graph: every parameter still gets its gradient, and the right one."""
    for engine in ("auto", "loop", "vmap", "ghost"):
        model = net().float()
        weak, strong = views()[0].float(), views()[1].float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                target = model(weak).argmax(1)  # the teacher's forward fills the cache
            gc = GradientConsistencyLoss(model, engine=engine)
            loss = gc(weak, strong, target) + 0 * model(strong).sum()
        loss.backward()
        used = [p for name, p in model.named_parameters() if name.startswith(("stem", "head"))]
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in used), engine
        exact = judge(model, weak, strong, target)
        assert compare.cosine_error(gc.last.cosine, exact.cosine) <= 0.05
        found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
        assert float(F.cosine_similarity(found.double(), exact.flat, dim=0)) > 0.99


# -- surroundings ----------------------------------------------------------------------------------------------------


# vmap refuses save_on_cpu by name: saved-tensor hooks under torch.func.grad.
SETTINGS = [
    *((name, engine) for name in ("float64", "deterministic", "anomaly") for engine in ("loop", "ghost")),
    *((name, engine) for name in ("bfloat16", "device") for engine in ("auto", "vmap")),
    *(("save_on_cpu", engine) for engine in ("auto", "loop")),
]


@pytest.mark.parametrize(("name", "engine"), SETTINGS)
def test_global_settings_of_the_user(name: str, engine: str) -> None:
    """Two engines a setting, in turn."""
    dtype = torch.get_default_dtype()
    contexts = {
        "device": lambda: torch.device("cpu"),
        "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
        "save_on_cpu": lambda: torch.autograd.graph.save_on_cpu(),
    }
    try:
        if name in ("float64", "bfloat16"):
            torch.set_default_dtype(getattr(torch, name))
        torch.use_deterministic_algorithms(name == "deterministic")
        with contexts.get(name, torch.enable_grad)():
            assert_exact(_plain_float64(), engine)
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(False)


def _plain_float64() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6, dtype=DOUBLE), nn.Tanh(), nn.Linear(6, 3, dtype=DOUBLE))
    for index, parameter in enumerate(model.parameters()):
        with torch.no_grad():
            parameter.copy_(torch.sin(torch.arange(parameter.numel()).double() + index).view_as(parameter))
    return model


@FUSED
@ENGINES
def test_two_losses_on_one_model_called_twice_and_differentiated_backwards(engine: str, fused: bool) -> None:
    """Graphs that are alive at once do not meet: the last call's backward first, the first one's last."""
    model = net()
    weak, strong, target = views()
    first = GradientConsistencyLoss(model, engine=engine, fused=fused)
    second = GradientConsistencyLoss(model, engine="loop", fused=not fused, encoder=model.stem)
    pairs = [(first, weak, strong), (second, weak, strong), (first, strong, 2 * weak), (second, 2 * strong, weak)]
    expected = [
        judge(model, w, s, target, compared=None if gc is first else lambda name: name.startswith("stem")).flat
        for gc, w, s in pairs
    ]
    values = [gc(w, s, target) for gc, w, s in pairs]
    for value, flat in reversed(list(zip(values, expected, strict=True))):
        assert compare.relative(compare.gradient_of(value, model), flat) <= 1e-8


def test_the_loss_in_a_wrapper_in_a_wrapper() -> None:
    """Two terms on one model, each counted and weighted for itself."""
    weak, strong, target = views()
    model, pair = net(), ViewPair(weak, strong, target)
    method = Layers(lambda m: StepOutput(F.cross_entropy(m.model(weak), target), pair), model=model)
    gc = GradientConsistencyLoss(model)
    inner = GGCRWrapper(method, gc, weight=0.1, warmup_steps=0)
    outer = GGCRWrapper(inner, GradientConsistencyLoss(model, encoder=model.stem), weight=0.3, warmup_steps=0)
    found = compare.gradient_of(outer().loss, model)
    flats = [judge(model, weak, strong, target).flat]
    flats.append(judge(model, weak, strong, target, compared=lambda name: name.startswith("stem")).flat)
    base = compare.gradient_of(method().loss, model)
    assert compare.relative(found, base + 0.1 * flats[0] + 0.3 * flats[1]) <= 1e-8
