"""A pruned network gives the same values after `rebuild` in another process."""

import json
import multiprocessing
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import processes
from torch import Tensor, nn

from drophot.structured import prune_channels, rebuild

Make = Callable[[], nn.Module]
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 2}
LANGUAGE: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "llama, tied": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 12}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 4}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 8}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
    ),
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            **{"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2},
            **{"num_heads": 4, "decoder_start_token_id": 0},
        },
    ),
}
GENERATING = LANGUAGE.keys() - {"bert"}
VISION: dict[str, tuple[str, str, int, Mapping[str, Any]]] = {
    "resnet": ("torchvision", "resnet18", 64, {}),
    "mobilenet": ("torchvision", "mobilenet_v3_small", 64, {}),
    "densenet": (
        "torchvision",
        "DenseNet",
        64,
        {"growth_rate": 8, "block_config": (2, 2), "num_init_features": 16},
    ),
    "swin": (
        "torchvision",
        "SwinTransformer",
        32,
        {
            **{"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]},
            "window_size": [4, 4],
        },
    ),
    "vit": ("timm", "vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 2}),
    "dinov3": ("timm", "vit_small_patch16_dinov3", 32, {"img_size": 32, "depth": 2}),
}
NAMES = [*LANGUAGE, *VISION]


def made(name: str) -> Any:
    """A network with the random weights of this process."""
    if name in LANGUAGE:
        transformers = pytest.importorskip("transformers")
        model, config, settings = LANGUAGE[name]
        return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
    library, kind, _, settings = VISION[name]
    found = pytest.importorskip(library)
    if library == "timm":
        return found.create_model(kind, num_classes=5, **settings).eval()
    return getattr(found.models, kind)(num_classes=5, **settings).eval()


def inputs(name: str, batch: int) -> dict[str, Tensor] | Tensor:
    random = torch.Generator().manual_seed(batch)
    if name in VISION:
        size = VISION[name][2]
        return torch.randn(batch, 3, size, size, generator=random)
    words = {"input_ids": torch.randint(3, 64, (batch, 5 + batch), generator=random)}
    if name == "t5":
        words["decoder_input_ids"] = words["input_ids"][:, :4].clone()
    return words


@torch.no_grad()
def answers(name: str, model: Any) -> list[Tensor]:
    """The outputs for two batch sizes, with and without a cache."""
    found = []
    for batch in (2, 3):
        given = inputs(name, batch)
        if isinstance(given, Tensor):
            found.append(model(given))
            continue
        caches = [{}] if name == "bert" else [{"use_cache": True}, {"use_cache": False}]
        found += [model(**given, **cache).logits for cache in caches]
        for cache in caches if name in GENERATING else ():
            words = given["input_ids"]
            options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **cache}
            found.append(model.generate(words, attention_mask=torch.ones_like(words), **options))
    return found


def prune(folder: Path) -> None:
    """Prune each network, and save it with its description and its outputs."""
    for name in NAMES:
        torch.manual_seed(0)
        try:
            model = made(name)
        except pytest.skip.Exception:
            continue
        result = prune_channels(model, 0.5, inputs(name, 2))
        assert result.parameters.removed > 0.25
        torch.save(answers(name, model), folder / f"{name}.here")
        torch.save(model.state_dict(), folder / f"{name}.pt")
        (folder / f"{name}.json").write_text(json.dumps(result.description))


def load(folder: Path) -> None:
    """Build each network in the other process, load it, and save its outputs."""
    for path in sorted(folder.glob("*.json")):
        torch.manual_seed(1)
        model = rebuild(made(path.stem), json.loads(path.read_text()))
        model.load_state_dict(torch.load(path.with_suffix(".pt")))
        torch.save(answers(path.stem, model), path.with_suffix(".there"))


def prune_and_load(folder: Path) -> None:
    """Both in processes of their own, forked from one that has imported the libraries."""
    for name in NAMES:
        with suppress(pytest.skip.Exception):
            made(name)
    fork = multiprocessing.get_context("fork")
    for function in (prune, load):
        process = fork.Process(target=function, args=(folder,))
        process.start()
        process.join()
        assert process.exitcode == 0


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], list[Tensor]]:
    """What a network gives "here", where it was pruned, and "there", in the other process."""
    folder = tmp_path_factory.mktemp("rebuilt")
    process = processes.begin(prune_and_load, folder, folder=folder, output=folder / "output")
    processes.finish(process, errors=folder / "output")

    def outputs(name: str, where: str) -> list[Tensor]:
        path = folder / f"{name}.{where}"
        if not path.with_suffix(".json").exists():
            pytest.skip(f"{VISION[name][0] if name in VISION else 'transformers'} is not installed")
        return torch.load(path)

    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_rebuilt_network_gives_equal_numbers_in_another_process(
    name: str, outputs: Callable[[str, str], list[Tensor]]
) -> None:
    here, there = outputs(name, "here"), outputs(name, "there")
    assert len(there) == len(here) > 1
    for one, other in zip(there, here, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(GENERATING))
def test_words_are_the_same_with_a_cache_and_without(
    name: str, outputs: Callable[[str, str], list[Tensor]]
) -> None:
    generated = [one for one in outputs(name, "here") if not one.is_floating_point()]
    assert len(generated) == 4
    assert torch.equal(generated[0], generated[1])
    assert torch.equal(generated[2], generated[3])
