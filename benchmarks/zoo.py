"""217 networks of timm, torchvision, Transformers and segmentation-models-pytorch.

Random weights, ten classes, and as small as an architecture allows: few layers, small images.
Parameter counts are those of `results/networks.csv`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 10
TOKENS = 100


def _words(text: str) -> list[str]:
    return text.split()


# A name, then what differs from 64 by 64 pixels and from the library's own arguments.
_TIMM: dict[str, dict[str, Any]] = {
    **{
        name: {}
        for name in _words("""
        resnet18 resnet26d resnext50_32x4d seresnet33ts ecaresnet26t resnetv2_50x1_bit
        regnetx_002 regnety_002 regnetz_b16 densenet121 dla34 dla60_res2net res2net50_26w_4s
        resnest14d skresnet18 dpn68 vovnet39a ese_vovnet19b_dw vgg11_bn inception_v3
        inception_resnet_v2 xception efficientnet_b0 efficientnet_b0_gn tf_efficientnetv2_b0
        mixnet_s
        mnasnet_100 mobilenetv2_100 mobilenetv3_large_100 mobilenetv4_conv_small fbnetv3_b lcnet_050
        ghostnet_100 ghostnetv2_100 ghostnetv3_100 repghostnet_050 rexnet_100 hgnetv2_b0
        hrnet_w18_small selecsls42 cs3darknet_focus_s cspnext_tiny nf_regnet_b0 repvgg_a0
        mobileone_s0 convnext_atto convnextv2_atto convnext_atto_rms inception_next_atto rdnet_tiny
        mambaout_femto starnet_s1 fasternet_t0 lcnetv2_small poolformer_s12 convformer_s18
        caformer_s18 edgenext_xx_small mobilevit_xxs mobilevitv2_050 fastvit_t8 fastvit_sa12
        repvit_m0_9 efficientvit_b0 efficientvit_l1 efficientvit_m0 efficientformer_l1
        efficientformerv2_s0 swiftformer_xs shvit_s1 efficientvim_m1 nextvit_small lowformer_b0
        cpubone_nano iformer_t csatv2 coatnet_nano_rw_224 maxvit_pico_rw_256 maxxvitv2_nano_rw_256
        botnet26t_256 halonet26t levit_128s levit_conv_128s tiny_vit_5m_224 visformer_tiny pvt_v2_b0
        pvt_v2_b2_li twins_pcpvt_small twins_svt_small davit_tiny focalnet_tiny_srf gcvit_xxtiny
        mvitv2_tiny coat_lite_tiny crossvit_tiny_240 pit_ti_224 convit_tiny nest_tiny sequencer2d_s
        hiera_tiny_224""")
    },
    **{
        name: {"img_size": 64, "depth": 2}
        for name in _words("""
        vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224
        vit_base_patch16_clip_224 vit_base_patch16_siglip_224 vit_small_patch14_dinov2
        vit_small_patch14_reg4_dinov2 vit_base_patch16_rpn_224 vit_relpos_small_patch16_224
        vit_small_r26_s32_224 eva02_tiny_patch14_224 eva_large_patch14_196 beit_base_patch16_224
        beit3_base_patch16_224 cait_xxs24_224 xcit_nano_12_p16_224 tnt_s_patch16_224
        vit_small_patch16_dinov3 aimv2_large_patch14_224 gemma4_vit_167m qwen3_vit_88m
        vit_base_patch16_rope_224 vit_pe_core_tiny_patch16_384""")
    },
    **{
        name: {"img_size": 64}
        for name in _words("""volo_d1_224 mixer_s32_224 resmlp_12_224 gmlp_ti16_224 gmixer_12_224
        vitamin_small_224""")
    },
    **{
        name: {"img_size": 64, "depths": (2, 2, 2, 2), "window_size": 4}
        for name in _words(
            """swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_ns_224"""
        )
    },
}
# Networks whose windows, strides or tables are made for one size of image.
_SIZES = {
    **dict.fromkeys(
        _words("""efficientformer_l1 efficientformerv2_s0 efficientvit_m0 iformer_t efficientvim_m1
        coatnet_nano_rw_224 levit_128s levit_conv_128s tiny_vit_5m_224 visformer_tiny
        twins_svt_small gcvit_xxtiny mvitv2_tiny coat_lite_tiny pit_ti_224 convit_tiny nest_tiny
        sequencer2d_s hiera_tiny_224"""),
        224,
    ),
    "crossvit_tiny_240": 240,
    **dict.fromkeys(
        _words("maxvit_pico_rw_256 maxxvitv2_nano_rw_256 botnet26t_256 halonet26t"), 256
    ),
    "csatv2": 512,
    **dict.fromkeys(["inception_v3", "inception_resnet_v2"], 96),
}

_TV = _words("""
    shufflenet_v2_x0_5 shufflenet_v2_x1_0 swin_t swin_v2_t alexnet vgg16_bn resnet18 resnet50
    resnext50_32x4d densenet121 squeezenet1_0 squeezenet1_1 inception_v3 googlenet googlenet_aux
    mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 efficientnet_b0 efficientnet_v2_s
    regnet_y_400mf regnet_x_400mf convnext_tiny maxvit_t vit_b_32""")
_SEGMENTATION = _words("""
    fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large
    lraspp_mobilenet_v3_large fcn_resnet50_aux""")
_DETECTION = _words("""
    fasterrcnn_resnet50_fpn fasterrcnn_mobilenet_v3_large_320_fpn fcos_resnet50_fpn
    retinanet_resnet50_fpn ssd300_vgg16 ssdlite320_mobilenet_v3_large
    maskrcnn_resnet50_fpn""")
_SMP = _words("""
    Unet_resnet18 UnetPlusPlus_resnet18 MAnet_resnet18 Linknet_resnet18 FPN_resnet18
    PSPNet_resnet18 PAN_resnet18 DeepLabV3_resnet18 DeepLabV3Plus_resnet18 UPerNet_resnet18
    Segformer_mit_b0 Unet_efficientnet-b0 Unet_timm-mobilenetv3_small_100""")

_TEXT = {
    "vocab_size": TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "num_labels": 5,
}
_LLAMA = _TEXT | {"num_key_value_heads": 2, "pad_token_id": 0, "num_labels": 2}
_VIT = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_labels": 5,
}
_T5 = {
    "vocab_size": TOKENS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
}
_BART = {
    "vocab_size": TOKENS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
_STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 5}
# A model's class, its configuration's class, and what is said there.
HF: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", _TEXT),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "vit": ("ViTForImageClassification", "ViTConfig", _VIT),
    "bert_mlm": ("BertForMaskedLM", "BertConfig", _TEXT),
    "roberta": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _TEXT | {"type_vocab_size": 2},
    ),
    "electra": (
        "ElectraForSequenceClassification",
        "ElectraConfig",
        _TEXT | {"embedding_size": 16},
    ),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", _TEXT | {"embedding_size": 16}),
    "mobilebert": (
        "MobileBertForSequenceClassification",
        "MobileBertConfig",
        _TEXT | {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": TOKENS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
        | {"num_labels": 5},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        _TEXT | {"ffn_dim": 64, "word_embed_proj_dim": 32, "num_labels": 2},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA),
    "gemma": (
        "GemmaForCausalLM",
        "GemmaConfig",
        _LLAMA | {"num_key_value_heads": 1, "head_dim": 8},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", _TEXT),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
    "t5_encoder": ("T5EncoderModel", "T5Config", _T5),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART | {"max_position_embeddings": 64}),
    "whisper_encoder": (
        "WhisperModel",
        "WhisperConfig",
        _BART
        | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    ),
    "clip_vision": (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        _VIT | {"projection_dim": 16},
    ),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", _VIT | {"mlp_ratio": 2}),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _VIT),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
        | {"window_size": 4, "num_labels": 5},
    ),
    "swinv2": (
        "Swinv2ForImageClassification",
        "Swinv2Config",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
        | {"window_size": 4, "num_labels": 5},
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32}
        | {"num_attention_heads": [1, 2, 4, 8], "num_labels": 5},
    ),
    "convnextv2": (
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_labels": 5},
    ),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        _STAGES | {"embedding_size": 16, "layer_type": "basic"},
    ),
}
_EAGER = ("bert", "gpt2", "llama", "vit")
_PIXELS = {"vit": 32, "deit": 32, "dinov2": 32, "clip_vision": 32}
_PIXELS |= {"swin": 32, "swinv2": 32}
_PIXELS |= dict.fromkeys(["segformer", "convnextv2", "resnet"], 64)

NAMES = [
    *(f"hf/{name}" for name in HF),
    *(f"hf/{name}_eager" for name in _EAGER),
    *(f"timm/{name}" for name in _TIMM),
    *(f"tv/{name}" for name in _TV),
    *(f"tvseg/{name}" for name in _SEGMENTATION),
    *(f"smp/{name}" for name in _SMP),
    *(f"tvdet/{name}" for name in _DETECTION),
]

Inputs = Callable[[int, int], Any]  # of a batch size and a seed


def make(name: str) -> tuple[nn.Module, Inputs, Inputs | None]:
    """A network, what it is called with, and the same of another size where it takes one."""
    torch.manual_seed(0)
    kind, _, own = name.partition("/")
    return {"hf": _hf, "timm": _timm, "smp": _smp, "tv": _tv, "tvseg": _tv, "tvdet": _tvdet}[kind](
        own
    )


def images(size: int) -> Inputs:
    def give(batch: int, seed: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 3, size, size, generator=random)

    return give


def _timm(name: str) -> tuple[nn.Module, Inputs, Inputs | None]:
    create = import_module("timm").create_model
    model = create(name, pretrained=False, num_classes=CLASSES, **_TIMM[name])
    size = _SIZES.get(name, 64)
    return model, images(size), images(size + 32) if size < 100 and not _TIMM[name] else None


def _tv(name: str) -> tuple[nn.Module, Inputs, Inputs | None]:
    models: Any = import_module("torchvision.models")
    size = 64
    options: dict[str, Any] = {"num_classes": CLASSES}
    if name in _SEGMENTATION:
        models = models.segmentation
        options |= {"weights_backbone": None, "aux_loss": name.endswith("_aux")}
        if name.startswith("lraspp"):
            del options["aux_loss"]
    elif name in ("inception_v3", "googlenet", "googlenet_aux"):
        options |= {"aux_logits": name.endswith("_aux"), "init_weights": False}
        size = 96 if name == "inception_v3" else 64
    elif name == "vit_b_32":
        options["image_size"] = 64
    elif name == "maxvit_t":
        size = 224
    model = getattr(models, name.removesuffix("_aux"))(**options)
    return model, images(size), None if name in ("vit_b_32", "maxvit_t") else images(size + 32)


def _tvdet(name: str) -> tuple[nn.Module, Inputs, Inputs | None]:
    models: Any = import_module("torchvision.models.detection")
    size = 320 if "320" in name else 300 if "300" in name else 128
    options = {} if size > 128 else {"min_size": size, "max_size": size}
    model = getattr(models, name)(
        weights=None, weights_backbone=None, num_classes=CLASSES, **options
    )

    def give(batch: int, seed: int) -> Any:
        random = torch.Generator().manual_seed(seed)
        return ([torch.rand(3, size, size, generator=random) for _ in range(batch)],)

    return model, give, None


def _smp(name: str) -> tuple[nn.Module, Inputs, Inputs | None]:
    library: Any = import_module("segmentation_models_pytorch")
    kind, _, encoder = name.partition("_")
    model = getattr(library, kind)(encoder, encoder_weights=None, classes=5)
    return model, images(128 if kind == "PAN" else 64), images(128 if kind != "PAN" else 192)


def _hf(name: str) -> tuple[nn.Module, Inputs, Inputs | None]:
    library: Any = import_module("transformers")
    eager = name.endswith("_eager")
    name = name.removesuffix("_eager")
    kind, config, said = HF[name]
    configuration = getattr(library, config)(**said)
    configuration.use_cache = False  # keys and values would be outputs, which keep their shape
    if eager:
        configuration._attn_implementation = "eager"
    model = getattr(library, kind)(configuration)
    if name == "whisper_encoder":
        model = model.encoder

        def mel(batch: int, seed: int) -> Any:
            random = torch.Generator().manual_seed(seed)
            return {"input_features": torch.randn(batch, 8, 32, generator=random)}

        return model, mel, None
    if name in _PIXELS:
        size = _PIXELS[name]

        def pixels(batch: int, seed: int) -> Any:
            return {"pixel_values": images(size)(batch, seed)}

        return model, pixels, None

    def tokens(length: int) -> Inputs:
        def give(batch: int, seed: int) -> Any:
            random = torch.Generator().manual_seed(seed)
            ids = torch.randint(3, TOKENS, (batch, length), generator=random)
            both = name in ("t5", "bart")
            return {"input_ids": ids} | ({"decoder_input_ids": ids} if both else {})

        return give

    return model, tokens(12), tokens(9)
