"""Named configurations: model class -> preset -> keyword arguments of its config. Data only."""

from __future__ import annotations

from typing import Any

# layers, hidden size, heads, MLP (MAGVIT table 8)
_MAGVIT_SIZES = {
    "b": (12, 768, 12, 3072),
    "l": (24, 1024, 16, 4096),
    "h": (32, 1280, 16, 5120),
}
_SHARED_PROMPTS = (
    "full_generation",
    "frame_prediction",
    "frame_interpolation",
    "outpainting",
    "inpainting",
)


def _magvit(layers: int, hidden: int, heads: int, mlp: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "mlp_size": mlp,
        "grid": (4, 16, 16),
        "num_subtokens": 1,
        "subtoken_size": 1024,
    }


def _image(*multipliers: int) -> dict[str, Any]:
    return {
        "filters": 128,
        "channel_multipliers": multipliers,
        "temporal_downsample": (False,) * (len(multipliers) - 1),
        "num_res_blocks": 4,
        "num_bits": 18,
        "frame_by_frame": True,
    }


def _image_discriminator(size: int, *multipliers: int) -> dict[str, Any]:
    return {
        "clip": (1, size, size),
        "filters": 128,
        "channel_multipliers": multipliers,
        "frame_by_frame": True,
    }


def _frame_discriminator(size: int, *multipliers: int) -> dict[str, Any]:
    return {**_image_discriminator(size, *multipliers), "filters": 64, "pooling": "average"}


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "MagvitV2Tokenizer": {
        # MAGVIT-v2, appendix architecture figure: 376,003,221 parameters, 17x128x128 -> 5x16x16.
        "magvit-v2-base": {
            "filters": 128,
            "channel_multipliers": (1, 2, 2, 4),
            "temporal_downsample": (False, True, True),
            "num_res_blocks": 4,
            "num_bits": 18,
        },
        # The ablation-size model ("58M" in Table 5a): 57,813,333 parameters.
        "magvit-v2-small": {
            "filters": 64,
            "channel_multipliers": (1, 2, 2, 4),
            "temporal_downsample": (False, True, True),
            "num_res_blocks": 2,
            "num_bits": 18,
        },
        # The image tokenizers: 18 bits, 16x16 tokens (at 8, 16 and 32 pixels a token). Their widths are
        # not published. At 128 pixels these are the video tokenizer's, which is inflated from it; at
        # 256 the multipliers are those of the open 2D model with the published strides; at 512 one more
        # level of the first width.
        "magvit-v2-image-128": _image(1, 2, 2, 4),
        "magvit-v2-image-256": _image(1, 1, 2, 2, 4),
        "magvit-v2-image-512": _image(1, 1, 1, 2, 2, 4),
        # The model of `magvit-fast demo`: 17x64x64 -> 5x8x8 = 320 tokens of 16 bits. Its 3.7M
        # parameters take 7.4 MB as float16, of the 16 MB for all shipped weights (a last width of
        # 128 would take 17.9 MB).
        "magvit-v2-demo": {
            "filters": 16,
            "channel_multipliers": (1, 2, 4, 4),
            "temporal_downsample": (False, True, True),
            "num_res_blocks": 1,
            "num_bits": 16,
            "norm_groups": 4,
            "num_token_groups": 2,
        },
    },
    "MagvitTokenizer": {
        # MAGVIT, table 1 and the released configs: 40.6M parameters, 16x128x128 -> 4x16x16.
        "magvit-b": {"filters": 64},
        # 157.8M parameters.
        "magvit-l": {"filters": 128},
        # In the released code alone: 308.4M parameters, tokens of 12 bits (a transformer for them has
        # subtoken_size=4096).
        "magvit-h": {
            "filters": 128,
            "num_res_blocks": 4,
            "codebook_size": 4096,
            "embedding_dim": 512,
        },
        # The BAIR layout, 16x64x64 -> 4x16x16: 36.6M and 141.9M parameters.
        "magvit-b-64": {
            "filters": 64,
            "channel_multipliers": (1, 2, 4),
            "temporal_downsample": (True, True),
        },
        "magvit-l-64": {
            "filters": 128,
            "channel_multipliers": (1, 2, 4),
            "temporal_downsample": (True, True),
        },
        # The 2D tokenizers that inflation starts from: 13.8M and 53.1M parameters.
        "magvit-2d-b": {
            "filters": 64,
            "temporal_downsample": (False, False, False),
            "frame_by_frame": True,
        },
        "magvit-2d-l": {
            "filters": 128,
            "temporal_downsample": (False, False, False),
            "frame_by_frame": True,
        },
        # The same for the BAIR layout, images of 64 pixels.
        **{
            f"magvit-2d-{size}-64": {
                "filters": filters,
                "channel_multipliers": (1, 2, 4),
                "temporal_downsample": (False, False),
                "frame_by_frame": True,
            }
            for size, filters in (("b", 64), ("l", 128))
        },
    },
    "FrameTokenizer": {
        # MaskViT: a VQ-GAN of the usual widths (the paper's are not known) with a 16x16 grid. 63.2M,
        # 70.2M and 72.0M parameters.
        "maskvit-frame-64": {"channel_multipliers": (1, 2, 4)},
        "maskvit-frame-128": {"channel_multipliers": (1, 2, 2, 4)},
        "maskvit-frame-256": {"channel_multipliers": (1, 1, 2, 2, 4)},
    },
    "MaskedTransformer": {
        # MAGVIT-v2's transformer for 17x128x128 video: 306.9M parameters with 101 classes (num_classes=101).
        "magvit-v2-l": {
            "hidden_size": 1024,
            "num_layers": 24,
            "num_heads": 16,
            "mlp_size": 4096,
            "grid": (5, 16, 16),
            "num_subtokens": 2,
            "subtoken_size": 512,
        },
        # The same for the image tokenizers' 16x16 tokens: 306.75M with 1000 classes (ImageNet).
        "magvit-v2-l-image": {
            "hidden_size": 1024,
            "num_layers": 24,
            "num_heads": 16,
            "mlp_size": 4096,
            "grid": (1, 16, 16),
            "num_subtokens": 2,
            "subtoken_size": 512,
            "num_classes": 1000,
        },
        # MAGVIT's B, L and H (the last in the released code alone) for 4x16x16 tokens: 87M, 306M and
        # 634M parameters. Single-task: the prefix is [class]; num_classes=101 is UCF-101.
        **{f"magvit-{size}": _magvit(*shape) for size, shape in _MAGVIT_SIZES.items()},
        # The same for several tasks: the prefix is [task][class], tasks share prompts as in the
        # released code (which further gives the inpainting tasks the outpainting prompt).
        **{
            f"magvit-{size}-multitask": {**_magvit(*shape), "prompts": _SHARED_PROMPTS}
            for size, shape in _MAGVIT_SIZES.items()
        },
        # The model of `magvit-fast demo`: 320 tokens of 16 bits; 3.6M parameters.
        "magvit-v2-demo": {
            "hidden_size": 256,
            "num_layers": 5,
            "num_heads": 4,
            "mlp_size": 768,
            "grid": (5, 8, 8),
            "num_subtokens": 2,
            "subtoken_size": 256,
        },
    },
    "MaskViTTransformer": {
        # MaskViT: 16 frames of 16x16 tokens. The matrices of the layers hold 85M and 151M weights; the
        # totals that the paper prints (189M and 255M for BAIR) probably include its VQ-GAN.
        "maskvit-base": {"hidden_size": 768, "mlp_size": 3072},
        "maskvit-large": {"hidden_size": 1024, "mlp_size": 4096},
    },
    "Discriminator3D": {
        # The published one for 17x128x128: 61,341,569 parameters.
        "magvit-v2-base": {
            "clip": (17, 128, 128),
            "filters": 128,
            "channel_multipliers": (2, 4, 4, 4, 4),
        },
        # Of the image tokenizers, 2D. Multipliers: as for video, of the open 2D model, one block more.
        "magvit-v2-image-128": _image_discriminator(128, 2, 4, 4, 4, 4),
        "magvit-v2-image-256": _image_discriminator(256, 2, 2, 4, 4, 4),
        "magvit-v2-image-512": _image_discriminator(512, 2, 2, 4, 4, 4, 4),
        # For MaskViT's frame tokenizers (whose own is not published): MAGVIT's, in 2D, down to 4x4.
        "maskvit-frame-64": _frame_discriminator(64, 2, 4, 4, 4),
        "maskvit-frame-128": _frame_discriminator(128, 2, 4, 4, 4, 4),
        "maskvit-frame-256": _frame_discriminator(256, 2, 4, 4, 4, 4, 4),
        # For training the demo's tokenizer.
        "magvit-v2-demo": {
            "clip": (17, 64, 64),
            "filters": 16,
            "channel_multipliers": (2, 4, 4, 4),
        },
    },
}

# The same sizes under a causal mask.
PRESETS["AutoregressiveTransformer"] = PRESETS["MaskedTransformer"]


def preset(model: str, name: str) -> dict[str, Any]:
    """The keyword arguments of one preset.

    Raises:
        ValueError: there is no such preset; the message lists those there are.
    """
    known = PRESETS.get(model, {})
    if name not in known:
        raise ValueError(
            f"name: {model} has no preset {name!r}; there are {', '.join(known) or 'none'}"
        )
    return dict(known[name])
