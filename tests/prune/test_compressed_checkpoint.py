"""Compressed checkpoints: exact, as small as theory says, and safe to read."""

import json
import os
import stat
import struct
import sys
import threading
import time
import zipfile
from collections import Counter
from copy import deepcopy
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import begin, finish
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from drophot.models import lenet
from drophot.prune import (
    compressed_checkpoint,
    load_compressed,
    magnitude_prune,
    save_compressed,
    summary,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class Holds(nn.Module):
    """A module with a state of any tensors."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(
        torch.equal(tensor.nan_to_num(7) if tensor.is_floating_point() else tensor, found)
        and tensor.dtype == other.state_dict()[name].dtype
        for name, tensor in one.state_dict().items()
        for found in [other.state_dict()[name]]
        for found in [found.nan_to_num(7) if found.is_floating_point() else found]
    )


@pytest.mark.parametrize(("sparsity", "share"), [(0.5, 0.54), (0.8, 0.24), (0.95, 0.09)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_is_as_small_as_theory_says(
    sparsity: float, share: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(500, 700), nn.Linear(700, 300)).to(dtype)
    magnitude_prune(model, sparsity)
    torch.save(model.state_dict(), tmp_path / "dense")
    save_compressed(model, tmp_path / "small")
    size, dense = ((tmp_path / name).stat().st_size for name in ("small", "dense"))
    theory = 1 - sparsity + 1 / (8 * dtype.itemsize)
    assert size / dense == pytest.approx(theory, abs=0.01)
    if dtype == torch.float32:
        assert size <= share * dense
    # What `summary` says of the parameters, and a description.
    assert 0 < size - summary(model).compressed_bytes < 2000


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 7), max_size=4),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_what_comes_back_is_equal(
    dtype: torch.dtype, shape: list[int], density: float, seed: int, tmp_path_factory
) -> None:
    torch.manual_seed(seed)
    tensor = torch.randn(shape, dtype=torch.float64).to(dtype)
    tensor = tensor * (torch.rand(shape) < density)
    path = tmp_path_factory.mktemp("one") / "model"
    model, other = Holds(x=tensor), Holds(x=torch.randn(shape).to(dtype))
    save_compressed(model, path)
    load_compressed(other, path)
    assert torch.equal(other.x, tensor)
    assert other.x.dtype == dtype


def test_all_kinds_of_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wild = torch.zeros(1000)
    wild[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-45])
    tensors = {
        "wild": wild,
        "integers": torch.arange(-5, 5),
        "bytes": torch.arange(200, dtype=torch.uint8),
        "flags": torch.rand(9) < 0.5,
        "imaginary": torch.randn(3, 2, dtype=torch.complex64),
        "scalar": torch.tensor(3.5),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "transposed": (torch.randn(30, 20) * (torch.rand(30, 20) < 0.1)).T,
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "eight": torch.randn(64).to(torch.float8_e4m3fn),
    }
    model = Holds(**tensors)
    other = Holds(**{name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    save_compressed(model, tmp_path / "model")
    load_compressed(other, tmp_path / "model")
    for name, tensor in tensors.items():
        found = other.get_buffer(name)
        assert found.dtype == tensor.dtype
        some, same = (t.float() if name == "eight" else t for t in (tensor, found))
        assert (
            torch.equal(some.nan_to_num(7), same.nan_to_num(7))
            if some.is_floating_point()
            else (torch.equal(some, same))
        )
    assert other.wild[:4].view(torch.int32).tolist() == wild[:4].view(torch.int32).tolist()


def test_zeros_of_either_sign_are_zeros(tmp_path: Path) -> None:
    """Weights multiplied by their masks have zeros of which half are negative."""
    torch.manual_seed(0)
    model, other = nn.Linear(100, 100), nn.Linear(100, 100)
    masks = magnitude_prune(model, 0.8)
    nn.init.normal_(model.weight).data.mul_(masks["weight"])
    assert (model.weight[model.weight == 0].signbit()).any()
    save_compressed(model, tmp_path / "model")
    assert (tmp_path / "model").stat().st_size < 0.26 * 4 * 10_100
    load_compressed(other, tmp_path / "model")
    assert torch.equal(other.weight, model.weight)


def test_shared_weights_are_written_once(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))
        model[1].weight = model[0].weight
        return model

    model, other = tied(), tied()
    save_compressed(model, tmp_path / "model")
    assert (tmp_path / "model").stat().st_size < 1.2 * 4 * 2600
    load_compressed(other, tmp_path / "model")
    assert same(model, other)
    assert other[0].weight is other[1].weight
    apart = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))
    load_compressed(apart, tmp_path / "model")
    assert torch.equal(apart[1].weight, model[0].weight)


def test_a_network_and_its_buffers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model(torch.randn(4, 3, 9, 9))
    magnitude_prune(model, 0.9)
    other = deepcopy(model)
    for tensor in other.state_dict().values():
        tensor.zero_()
    parameters = list(other.parameters())
    save_compressed(model, tmp_path / "model")
    load_compressed(other, str(tmp_path / "model"))
    assert same(model, other)
    assert all(a is b for a, b in zip(parameters, other.parameters(), strict=True))


def test_the_file_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    save_compressed(lenet(), path)
    content = path.read_bytes()

    def fails(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(compressed_checkpoint, "_write", fails)
    with pytest.raises(OSError, match="no space"):
        save_compressed(lenet(), path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_in_it_is_a_pickle(tmp_path: Path) -> None:
    save_compressed(lenet(), tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model") as archive:
        assert archive.testzip() is None
        header = json.loads(archive.read("drophot.json"))
        assert header["format"] == "drophot compressed 1"
        assert not any(name.endswith(".pkl") for name in archive.namelist())
        assert archive.getinfo("0").compress_type == zipfile.ZIP_STORED


def rewritten(path: Path, change) -> None:
    """The same archive with another description or other contents."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    header = json.loads(files["drophot.json"])
    change(header, files)
    if "drophot.json" in files:
        files["drophot.json"] = json.dumps(header).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def entry(header: dict, name: str = "fc1.weight") -> dict:
    return header["tensors"][name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, f: f.pop("drophot.json"), "damaged or something else"),
        (lambda h, f: h.update(format="drophot compressed 9"), "`path`.*drophot compressed 9"),
        (lambda h, f: h["tensors"].pop("fc1.bias"), r"`model`.*\['fc1.bias'\]"),
        (lambda h, f: h["tensors"].update(more={}), r"`model`.*\['more'\]"),
        (lambda h, f: entry(h).update(shape=[10**9, 10**9]), "`model`.*`fc1.weight`.*1000000000"),
        (lambda h, f: entry(h).update(dtype="float64"), "`model`.*`fc1.weight`.*float64"),
        (lambda h, f: entry(h).update(nonzeros=10**12), "`path`.*1000000000000"),
        (lambda h, f: entry(h).update(nonzeros=-1), "`path`.*-1"),
        (lambda h, f: entry(h).update(nonzeros="all"), "`path`.*'all'"),
        (lambda h, f: entry(h).update(nonzeros=3), "`path`.*`fc1.weight`"),
        (lambda h, f: entry(h).update(file="../../etc/passwd"), "damaged or something else"),
        (lambda h, f: entry(h).pop("dtype"), "damaged or something else"),
        (lambda h, f: entry(h).update({"same as": "nowhere"}), "damaged or something else"),
        (lambda h, f: f.pop(f"{entry(h)['file']}.mask"), "damaged or something else"),
        (lambda h, f: f.update({entry(h)["file"]: b"12345678"}), "`path`.*8 bytes"),
        (lambda h, f: f.update({f"{entry(h)['file']}.mask": bytes(3840)}), "another number"),
        (lambda h, f: f.update({f"{entry(h)['file']}.mask": bytes(9)}), "`path`.*9 bytes.*3,840"),
        (lambda h, f: h.update(metadata=[]), "damaged or something else"),
        (lambda h, f: h.update(metadata={"fc1": "ab"}), "'ab'"),
        (lambda h, f: h.update(tensors=[]), "damaged or something else"),
        (lambda h, f: h.update(more="x" * (1 << 21)), "`path`.*'drophot.json'.* at most 1,"),
        (lambda h, f: h.update(format="x" * 9999), "`path`.*'x{50}'"),
        (
            lambda h, f: h["tensors"].update({f"{n}{'x' * 900}": {} for n in range(500)}),
            "'0x{99}'.* and 480 more",
        ),
    ],
)
def test_a_file_that_is_not_right_changes_nothing(change, message: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = lenet(), lenet()
    magnitude_prune(model, 0.8)
    save_compressed(model, tmp_path / "model")
    rewritten(tmp_path / "model", change)
    before = deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message):
        load_compressed(other, tmp_path / "model")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


@given(st.integers(0, 10_000), st.integers(0, 255))
@example(2139, 4)  # a compression that Python does not know
@example(2136, 1)  # said to be encrypted
@example(2061, 1)  # in the description
def test_damage_is_seen(tmp_path_factory, place: int, byte: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 40)
    magnitude_prune(model, 0.8)
    path = tmp_path_factory.mktemp("damaged") / "model"
    save_compressed(model, path)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = byte
    path.write_bytes(bytes(content))
    other = nn.Linear(40, 40)
    before = deepcopy(other.state_dict())
    try:
        load_compressed(other, path)
    except ValueError:
        assert all(torch.equal(w, before[name]) for name, w in other.state_dict().items())
    else:  # a byte that says nothing, a date, or the same one
        assert same(model, other)


@pytest.mark.parametrize("length", [0, 10, 500])
def test_a_file_that_is_cut_short_or_no_archive(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_compressed(lenet(), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="`path`"):
        load_compressed(lenet(), path)
    path.write_bytes(struct.pack("<1000f", *range(1000)))
    with pytest.raises(ValueError, match="damaged or something else"):
        load_compressed(lenet(), path)
    with pytest.raises(FileNotFoundError):
        load_compressed(lenet(), tmp_path / "nowhere")


class Scaled(nn.Module):
    """Keeps its weight in another unit than it saves it in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = (self.weight * 2).detach()

    def _load_from_state_dict(self, state_dict, prefix, *_) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.weight.data.copy_(state_dict[f"{prefix}weight"] / 2)


class GivesCopies(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_state_dict_post_hook(
            lambda module, state, *_: state.update({k: v.clone() for k, v in state.items()})
        )


class Derives(nn.Linear):
    """Refreshes what it computes from its weight where a hook says that it was loaded."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.fused = self.weight.detach().t()
        self.register_load_state_dict_post_hook(lambda module, _: module.fuse())

    def fuse(self) -> None:
        self.fused = self.weight.detach().t().clone()


class Seen(nn.Linear):
    """A tensor as extra state."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.seen = torch.randn(2)

    def get_extra_state(self) -> Tensor:
        return self.seen

    def set_extra_state(self, state: Tensor) -> None:
        self.seen = state


class Versioned(nn.Linear):
    """Reads the states of its first version in another unit."""

    _version = 2

    def __init__(self) -> None:
        super().__init__(4, 4)

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if rest[0].get("version", 1) < 2:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * 10
        super()._load_from_state_dict(state_dict, prefix, *rest)


@pytest.mark.parametrize("kind", [Scaled, GivesCopies, Derives, Seen, Versioned])
def test_a_module_loads_as_it_does_from_its_state_dict(kind, tmp_path: Path) -> None:
    model, other, plain = (nn.Sequential(kind()) for _ in range(3))
    save_compressed(model, tmp_path / "model")
    load_compressed(other, tmp_path / "model")
    plain.load_state_dict(model.state_dict())
    for part in ("weight", "fused", "seen"):
        found, expected = (getattr(net[0], part, torch.zeros(1)) for net in (other, plain))
        assert torch.equal(found, expected)
    assert torch.equal(other[0].weight, model[0].weight)


def test_a_module_reads_a_state_by_the_version_that_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = Versioned(), Versioned()
    monkeypatch.setattr(Versioned, "_version", 1)
    save_compressed(model, tmp_path / "old")
    monkeypatch.undo()
    load_compressed(other, tmp_path / "old")
    assert torch.equal(other.weight, 10 * model.weight)
    save_compressed(model, tmp_path / "no notes")
    rewritten(tmp_path / "no notes", lambda header, _: header.pop("metadata"))
    load_compressed(other, tmp_path / "no notes")
    assert torch.equal(other.weight, model.weight), "files from before: the version of today"


@pytest.mark.parametrize(
    ("do", "argument", "found"),
    [
        (lambda path: save_compressed(nn.Linear(2, 2).state_dict(), path), "model", "OrderedDict"),
        (lambda path: save_compressed(path, nn.Linear(2, 2)), "model", "model.drophot"),
        (lambda path: load_compressed(path, nn.Linear(2, 2)), "model", "model.drophot"),
        (lambda path: load_compressed(str(path), nn.Linear(2, 2)), "model", "model.drophot"),
        (lambda path: load_compressed(nn.Linear(2, 2), None), "path", "NoneType"),
        (lambda path: save_compressed(nn.Linear(2, 2), nn.Linear(2, 2)), "path", "Linear"),
    ],
)
def test_swapped_arguments_are_named(do, argument: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"`{argument}`.*{found}"):
        do(tmp_path / "model.drophot")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_memory_is_named(tmp_path: Path) -> None:
    save_compressed(nn.Linear(2, 2), tmp_path / "model")
    with pytest.raises(ValueError, match="`model`.*meta.*`weight`"):
        load_compressed(nn.Linear(2, 2, device="meta"), tmp_path / "model")


class Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Extra(2, 2), "`_extra_state`.*dict"),
        (lambda: Holds(x=torch.eye(4).to_sparse()), "`x`.*Tensor.*torch.float32"),
        (lambda: nn.Linear(2, 2, device="meta"), "`weight`.* on meta"),
    ],
)
def test_what_is_no_dense_tensor_is_refused_by_name(model, message: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=message):
        save_compressed(model(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_model_is_told_to_run_first(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_compressed(nn.Sequential(nn.Linear(4, 3)), path)
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"`model`.*`0\.weight`.*batch"):
        load_compressed(model, path)
    model(torch.zeros(1, 4))
    load_compressed(model, path)


# --- files from anybody --------------------------------------------------------------------------


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("part", ["drophot.json", "0", "0.mask"])
def test_parts_that_have_to_be_inflated_are_refused(method: int, part: str, tmp_path: Path) -> None:
    model = nn.Linear(40, 40)
    magnitude_prune(model, 0.8)
    save_compressed(model, tmp_path / "model")
    with (
        zipfile.ZipFile(tmp_path / "model") as source,
        zipfile.ZipFile(tmp_path / "other", "w") as archive,
    ):
        for name in source.namelist():
            kind = method if name == part else zipfile.ZIP_STORED
            archive.writestr(name, source.read(name), compress_type=kind)
    with pytest.raises(ValueError, match=f"`path`.*'{part}'.*method {method}"):
        load_compressed(nn.Linear(40, 40), tmp_path / "other")


def test_a_description_that_inflates_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("drophot.json", b" " * 10_000_000)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="compressed by method 8"):
        load_compressed(nn.Linear(2, 2), path)


def test_a_size_beyond_the_file_is_not_believed(tmp_path: Path) -> None:
    """The archive says of a part that it is larger than the whole file."""
    path = tmp_path / "model"
    save_compressed(nn.Linear(2, 2), path)
    content = path.read_bytes()
    at = content.rindex(b"PK\x01\x02")  # the directory's last entry, that of the description
    huge = struct.pack("<II", 1_000_000, 1_000_000)
    path.write_bytes(content[: at + 20] + huge + content[at + 28 :])
    with pytest.raises(ValueError, match=r"'drophot.json'.*1,000,000 .* at most [\d,]+"):
        load_compressed(nn.Linear(2, 2), path)


def damaged(path: Path, model: nn.Module, places: range, change: int) -> Counter[str]:
    """How loading ends for each place that is changed; never in other values."""
    content = path.read_bytes()
    ends: Counter[str] = Counter()
    for place in places:
        wrong = bytearray(content)
        wrong[place % len(content)] ^= change
        path.write_bytes(bytes(wrong))
        other = nn.Linear(8, 8)
        before = deepcopy(other.state_dict())
        try:
            load_compressed(other, path)
        except ValueError:
            assert all(torch.equal(w, before[name]) for name, w in other.state_dict().items())
            ends["refused"] += 1
        else:
            assert same(model, other)
            ends["loaded"] += 1
    path.write_bytes(content)
    return ends


@pytest.mark.slow
@pytest.mark.parametrize("change", [0x01, 0x0E, 0x55, 0xFF])
def test_every_byte_counts(change: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    magnitude_prune(model, 0.8)
    save_compressed(model, tmp_path / "model")
    size = (tmp_path / "model").stat().st_size
    ends = damaged(tmp_path / "model", model, range(size), change)
    assert ends["refused"] > size / 2


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_byte_of_an_archive_of_another_kind(method: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    save_compressed(model, tmp_path / "stored")
    with (
        zipfile.ZipFile(tmp_path / "stored") as source,
        zipfile.ZipFile(tmp_path / "model", "w", method) as archive,
    ):
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    size = (tmp_path / "model").stat().st_size
    ends = damaged(tmp_path / "model", model, range(0, size, 3), 0x55)
    assert ends["loaded"] == 0


def test_every_length(tmp_path: Path) -> None:
    save_compressed(nn.Linear(8, 8), tmp_path / "model")
    content = (tmp_path / "model").read_bytes()
    for length in range(len(content)):
        (tmp_path / "model").write_bytes(content[:length])
        with pytest.raises(ValueError, match="`path`"):
            load_compressed(nn.Linear(8, 8), tmp_path / "model")


def test_notes_that_would_not_load_are_not_saved(tmp_path: Path) -> None:
    class Notes(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_state_dict_post_hook(
                lambda module, state, prefix, local: local.update(notes="x" * (2 << 20))
            )

    with pytest.raises(ValueError, match="`model`.*2,097,"):
        save_compressed(Notes(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# --- through the model's own protocol ------------------------------------------------------------


@pytest.mark.parametrize("state", [torch.zeros(0), torch.randn(7), torch.eye(9), torch.arange(3)])
def test_extra_state_may_have_grown(state: Tensor, tmp_path: Path) -> None:
    model, other = Seen(), Seen()
    model.seen = state
    save_compressed(model, tmp_path / "model")
    load_compressed(other, tmp_path / "model")
    assert torch.equal(other.seen, state)
    assert other.seen.dtype == state.dtype


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.update(shape=[1 << 40, 1 << 40]),
        lambda e: e.update(shape=[1 << 40], nonzeros=0),
        lambda e: e.update(shape=[-1]),
        lambda e: e.update(shape=["a"]),
        lambda e: e.update(shape=[3.5]),
        lambda e: e.update(dtype="nn"),
        lambda e: e.update(dtype="nowhere"),
        lambda e: e.update(shape=5),
    ],
)
def test_extra_state_is_bounded_by_the_file(change, tmp_path: Path) -> None:
    model, other = Seen(), Seen()
    save_compressed(model, tmp_path / "model")
    rewritten(tmp_path / "model", lambda header, _: change(entry(header, "_extra_state")))
    before = deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="`path`"):
        load_compressed(other, tmp_path / "model")
    assert all(torch.equal(w, before[name]) for name, w in other.state_dict().items())


def test_an_expanded_buffer_is_named_before_anything_changes(tmp_path: Path) -> None:
    def model() -> nn.Module:
        return Holds(first=torch.randn(3), x=torch.randn(1, 3).expand(4, 3))

    one, other = model(), model()
    save_compressed(one, tmp_path / "model")
    before = other.first.clone()
    with pytest.raises(ValueError, match=r"`model`.*`x`.*\(4, 3\).*clone"):
        load_compressed(other, tmp_path / "model")
    assert torch.equal(other.first, before)
    other.x = other.x.clone()
    load_compressed(other, tmp_path / "model")
    assert same(one, other)


def test_a_hook_that_fails_says_that_the_model_is_loaded_in_part(tmp_path: Path) -> None:
    def fails(*_: object) -> None:
        raise KeyError("mine")

    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    save_compressed(model, tmp_path / "model")
    other.register_load_state_dict_post_hook(fails)
    with pytest.raises(KeyError, match="mine") as caught:
        load_compressed(other, tmp_path / "model")
    assert "the model may be loaded in part" in caught.value.__notes__[0]


def test_a_model_of_other_tensors_is_not_taken_for_a_damaged_file(tmp_path: Path) -> None:
    save_compressed(nn.Linear(2, 2), tmp_path / "model")
    with pytest.raises(TypeError, match="`model` .*`_extra_state`.*dict"):
        load_compressed(Extra(2, 2), tmp_path / "model")


# --- writers beside each other -------------------------------------------------------------------


def constant(value: float) -> nn.Module:
    model = nn.Linear(300, 300, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def test_names_that_a_wrapper_changed_are_told_apart_from_another_model(tmp_path: Path) -> None:
    path, model = tmp_path / "model", nn.Linear(3, 3)
    save_compressed(nn.DataParallel(model), path)
    with pytest.raises(ValueError, match=r"`model` .*module\.weight.*wrapper"):
        load_compressed(model, path)
    with pytest.raises(ValueError, match="another model"):
        load_compressed(nn.Sequential(model), path)


def test_another_dtype_is_refused_with_the_call_that_helps(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_compressed(nn.Linear(3, 3).half(), path)
    with pytest.raises(ValueError, match=r"`model` .*float32.*model.to\(torch.float16\)"):
        load_compressed(nn.Linear(3, 3), path)


def test_threads_that_save_to_one_path_do_not_damage_it(tmp_path: Path) -> None:
    path, errors = tmp_path / "model", []

    def save(value: float) -> None:
        try:
            for _ in range(10):
                save_compressed(constant(value), path)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(value,)) for value in (1.0, 2.0, 3.0)]
    save(1.0)
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        model = constant(0.0)
        load_compressed(model, path)
        assert len(set(model.weight.flatten().tolist())) == 1
    assert errors == []
    assert list(tmp_path.iterdir()) == [path]


def save_slowly(path: Path, folder: Path) -> None:
    """Save, but wait in the middle until there is a file `folder`/go."""
    os.getpid = lambda: 1  # as in a container
    write = compressed_checkpoint._write

    def slow(*arguments: Any) -> Any:
        out = write(*arguments)
        (folder / "writing").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        return out

    compressed_checkpoint._write = slow
    save_compressed(nn.Linear(20, 20), path)


def writer(path: Path, folder: Path) -> BaseProcess:
    """A process in the middle of saving."""
    folder.mkdir()
    process = begin(save_slowly, path, folder, folder=folder, output=folder / "output")
    while not (folder / "writing").exists():
        assert process.exitcode is None, (folder / "output").read_text()
        time.sleep(0.01)
    return process


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".part")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be removed there")
def test_what_killed_writers_left_goes_and_what_others_write_stays(tmp_path: Path) -> None:
    folder, processes = tmp_path / "folder", tmp_path / "processes"
    folder.mkdir()
    processes.mkdir()
    path = folder / "model"
    live = writer(path, processes / "live")
    (mine,) = parts(folder)
    killed = writer(path, processes / "killed")
    killed.kill()
    killed.join()
    assert len(parts(folder)) == 2
    others = ["model.backup.part", "model.0123456789abcdef.part.txt", "other.0123456789abcdef.part"]
    for name in others:
        (folder / name).write_text("somebody's")
    model, found = nn.Linear(20, 20), nn.Linear(20, 20)
    save_compressed(model, path)
    load_compressed(found, path)
    assert same(model, found)
    assert sorted(p.name for p in folder.iterdir()) == sorted([*others, mine, "model"])
    (processes / "live" / "go").touch()
    finish(live, errors=processes / "live" / "output")
    assert sorted(p.name for p in folder.iterdir()) == sorted([*others, "model"])
    load_compressed(found, path)
    assert not same(model, found), "the one that ended last"


@pytest.mark.skipif(os.name != "posix", reason="modes and links as POSIX has them")
def test_the_file_has_the_mode_that_open_would_give(tmp_path: Path) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    old = os.umask(0o027)
    try:
        save_compressed(nn.Linear(2, 2), tmp_path / "new")
        assert mode(tmp_path / "new") == 0o640
        (tmp_path / "new").chmod(0o604)
        save_compressed(nn.Linear(2, 2), tmp_path / "new")
        assert mode(tmp_path / "new") == 0o604, "that of the file that was there"
    finally:
        os.umask(old)


@pytest.mark.skipif(os.name != "posix", reason="modes and links as POSIX has them")
def test_a_link_still_leads_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "model")
    for _ in range(2):
        model, other = nn.Linear(2, 2), nn.Linear(2, 2)
        save_compressed(model, tmp_path / "link")
        load_compressed(other, tmp_path / "folder" / "model")
        assert same(model, other)
        assert (tmp_path / "link").is_symlink()
    assert len(list((tmp_path / "folder").iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="modes and links as POSIX has them")
def test_what_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/model'$"):
        save_compressed(nn.Linear(2, 2), tmp_path / "nowhere" / "model")
    with pytest.raises(IsADirectoryError, match="`path` .*directory"):
        save_compressed(nn.Linear(2, 2), tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="`path` .*pipe"):
        save_compressed(nn.Linear(2, 2), tmp_path / "pipe")
    (tmp_path / "pipe").unlink()
    (tmp_path / "old").write_text("old")
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # root may write anything
    with pytest.raises(PermissionError, match="`path` .*old"):
        save_compressed(nn.Linear(2, 2), tmp_path / "old")
    assert (tmp_path / "old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_the_longest_name_that_a_file_can_have(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    save_compressed(model, path)
    load_compressed(other, path)
    assert same(model, other)
    assert list(tmp_path.iterdir()) == [path]
