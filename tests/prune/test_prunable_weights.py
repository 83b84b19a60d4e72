"""What magnitude and structured pruning refuse by name, before anything changes."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as older

from drophot.prune import magnitude_prune
from drophot.structured import prune_channels


def both(model: nn.Module) -> list[Callable[[], object]]:
    inputs = torch.ones(2, 8)
    return [
        lambda: magnitude_prune(model, 0.5),
        lambda: magnitude_prune(model, 0.5, scope="lamp"),
        lambda: magnitude_prune(model, 0.5, pattern="2:4"),
        lambda: prune_channels(model, 0.5, inputs),
    ]


def content(weight: Tensor) -> list:
    if nn.parameter.is_lazy(weight) or weight.is_meta:
        return []
    return weight.detach().to_dense().dequantize().float().tolist()


def refused(model: nn.Module, error: type[Exception], message: str) -> None:
    shape = repr(model)
    parameters = dict(model.named_parameters())
    values = {name: content(parameter) for name, parameter in parameters.items()}
    for prune in both(model):
        with pytest.raises(error, match=message):
            prune()
        assert repr(model) == shape
        for name, parameter in model.named_parameters():
            assert parameter is parameters[name]
            assert content(parameter) == values[name]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def test_weights_that_are_shared_count_once_and_stay_shared() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    masks = magnitude_prune(model, 0.5)
    assert list(masks) == ["0.weight"]
    assert int((model[0].weight == 0).sum()) == 32
    # One weight that maps the network's inputs and makes its outputs: neither may shrink.
    with pytest.raises(ValueError, match="removes none"):
        prune_channels(model, 0.5, torch.ones(2, 8))
    assert model[0].weight is model[1].weight


def test_two_parameters_over_the_same_memory_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight.data = model[0].weight.data
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"`0\.weight` and `1\.weight`"):
        magnitude_prune(model, 0.5)
    with pytest.raises(ValueError, match=r"`0\.weight` and `1\.weight`"):
        prune_channels(model, 0.5, torch.randn(2, 6))
    embedding = nn.Embedding(20, 6)  # not pruned, but it would lose the weights
    output = nn.Linear(6, 20, bias=False)
    output.weight.data = embedding.weight.data
    for pruned in (
        lambda net: magnitude_prune(net, 0.5),
        lambda net: prune_channels(net, 0.5, torch.zeros(2, 3, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match=r"`2\.weight` and `0\.weight`"):
            pruned(nn.Sequential(embedding, nn.Linear(6, 6), output))
    output.weight = embedding.weight
    magnitude_prune(nn.Sequential(embedding, nn.Linear(6, 6), output), 0.5)
    assert torch.equal(model[0].weight, before)
    whole = torch.randn(12, 6)  # parts of one tensor are different weights
    model[0].weight.data, model[1].weight.data = whole[:6], whole[6:]
    magnitude_prune(model, 0.5)


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 8))
    refused(model, ValueError, "`0.weight`.*no data.*one batch")


def test_weights_on_the_meta_device() -> None:
    refused(network().to("meta"), ValueError, "`0.weight`.*no data")


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: nn.utils.parametrizations.spectral_norm(layer),
        lambda layer: older.l1_unstructured(layer, "weight", amount=0.3),
    ],
)
def test_weights_that_are_computed(change: Callable[[nn.Module], object]) -> None:
    model = network()
    change(model[2])
    refused(model, ValueError, "`2.weight`.*parametrization")


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_weights_that_are_views_of_fewer_or_of_negated_values(pattern: str | None) -> None:
    views = {
        "an expanded view": torch.arange(1.0, 9.0)[:, None].expand(8, 8),
        "a negated view": torch.complex(torch.ones(8, 8), torch.ones(8, 8)).conj().imag,
    }
    for kind, view in views.items():
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[1].weight = nn.Parameter(view)
        before = model[0].weight.detach().clone()
        with pytest.raises(ValueError, match=rf"`1\.weight` of shape \(8, 8\) is {kind}.*clone"):
            magnitude_prune(model, 0.5, pattern=pattern)
        assert torch.equal(model[0].weight, before)
        model[1].weight = nn.Parameter(model[1].weight.detach().clone())  # as the message says
        masks = magnitude_prune(model, 0.5, pattern=pattern)
        assert all(torch.equal(model.get_parameter(n) != 0, mask) for n, mask in masks.items())


def test_sparse_weights() -> None:
    model = network()
    model[2].weight = nn.Parameter(model[2].weight.detach().to_sparse())
    refused(model, ValueError, "`2.weight`.*torch.sparse_coo.*to_dense")


def test_integers_and_eight_bit_floats() -> None:
    model = network()
    model[2].weight = nn.Parameter(torch.ones(8, 16, dtype=torch.int8), requires_grad=False)
    refused(model, TypeError, "`2.weight`.*torch.int8")
    model[2].weight = nn.Parameter(torch.ones(8, 16).to(torch.float8_e4m3fn), requires_grad=False)
    refused(model, TypeError, "`2.weight`.*torch.float8_e4m3fn")


@pytest.mark.filterwarnings("ignore")  # torch's own quantisation is on its way out
def test_quantised_weights() -> None:
    model = network()
    weight = torch.quantize_per_tensor(model[2].weight.detach(), 0.1, 0, torch.qint8)
    model[2].weight = nn.Parameter(weight, requires_grad=False)
    refused(model, TypeError, "`2.weight`.*Tensor of torch.qint8")


class Packed(torch.Tensor):
    """A subclass, as libraries for quantisation make them."""


def test_weights_of_a_tensor_of_another_kind() -> None:
    model = network()
    packed = torch.randn(8, 16).as_subclass(Packed)
    model[2].register_parameter("weight", nn.Parameter(packed))
    refused(model, TypeError, "`2.weight`.*Packed of torch.float32")


@pytest.fixture
def processes() -> Iterator[None]:
    if not torch.distributed.is_available():
        pytest.skip("torch without torch.distributed")
    store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("processes")
@pytest.mark.filterwarnings("ignore:DTensor random operators")
def test_weights_that_are_sharded_over_processes() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = network()
    mesh = init_device_mesh("cpu", (1,))
    model[2].weight = nn.Parameter(distribute_tensor(model[2].weight.detach(), mesh, [Shard(0)]))
    for prune in both(model):
        with pytest.raises(ValueError, match="`2.weight`.*sharded.*DTensor"):
            prune()


@pytest.mark.usefixtures("processes")
@pytest.mark.filterwarnings("ignore")  # of FSDP on a CPU
@pytest.mark.parametrize("original", [True, False])
def test_a_model_in_fsdp(original: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    try:
        model = FullyShardedDataParallel(
            network(), device_id=torch.device("cpu"), use_orig_params=original
        )
    except (RuntimeError, ValueError, AttributeError, AssertionError) as error:
        pytest.skip(f"no FSDP on this CPU: {error}")
    for prune in both(model):
        with pytest.raises(ValueError, match="`the model`.*FullyShardedDataPar"):
            prune()
    for prune in both(nn.Sequential(model)):
        with pytest.raises(ValueError, match="`0`.*FullyShardedDataParallel"):
            prune()


@pytest.mark.usefixtures("processes")
@pytest.mark.filterwarnings("ignore")
def test_a_model_in_fully_shard() -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("torch without fully_shard")
    from torch.distributed.device_mesh import init_device_mesh

    model = network()
    try:
        fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    except (RuntimeError, ValueError, AttributeError, AssertionError) as error:
        pytest.skip(f"no fully_shard on this CPU: {error}")
    for prune in both(model):
        with pytest.raises(ValueError, match="`0.weight`.*sharded"):
            prune()
