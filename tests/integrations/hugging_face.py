# SPDX-License-Identifier: Apache-2.0
"""Small models of transformers' families with random weights, and an input for each."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

WIDTH, HEADS = 32, 4
SIZE = 64  # levels of 8 x 8, 4 x 4, 2 x 2


def why_not() -> str | None:
    """Why its models cannot run here, or None where they can."""
    if find_spec("transformers") is None:
        return "transformers is not installed"
    import transformers

    if transformers.is_torch_available():
        return None
    return f"transformers {transformers.__version__} refuses torch {torch.__version__}"


def build(family: str, **changes: Any) -> nn.Module:
    """A model in float64 whose offsets and weights are not their initial values."""
    torch.manual_seed(0)
    names = importlib.import_module(f"transformers.models.{family}")
    config, kind = _CONFIGS[family](**changes)
    model = getattr(names, kind)(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def example(family: str) -> dict[str, Any]:
    """Two pictures, the second padded where the family takes a mask, and what else it needs."""
    torch.manual_seed(1)
    inputs: dict[str, Any] = {"pixel_values": torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)}
    if family in MASKED:
        inputs["pixel_mask"] = torch.ones(2, SIZE, SIZE, dtype=torch.long)
        inputs["pixel_mask"][1, SIZE // 2 :] = 0
        inputs["pixel_mask"][1, :, SIZE // 4 * 3 :] = 0
    return inputs | _TEXTS.get(family, dict)()


MASKED = ("deformable_detr", "grounding_dino", "mm_grounding_dino", "lw_detr", "rf_detr")


def _backbone(first: int = 2) -> Any:
    """A ResNet with features of 4 * 2**(first - 1) pixels and more."""
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 8, 8, WIDTH],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_indices=list(range(first, 5)),
    )


def _detr(**changes: Any) -> dict[str, Any]:
    """What the configurations of Deformable DETR's kind share."""
    return {
        "backbone_config": _backbone(),
        "d_model": WIDTH,
        "num_queries": 5,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": WIDTH,
        "decoder_ffn_dim": WIDTH,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "decoder_n_points": 3,
        **changes,
    }


def _rt_detr(**changes: Any) -> dict[str, Any]:
    """The same of RT-DETR's kind."""
    return _detr(
        encoder_hidden_dim=WIDTH,
        encoder_in_channels=[8, 8, WIDTH],
        decoder_in_channels=[WIDTH] * 3,
        hidden_expansion=0.5,
        **changes,
    )


def _deformable_detr(**changes: Any) -> Any:
    from transformers import DeformableDetrConfig

    given = _detr(encoder_n_points=2, dropout=0.1, num_feature_levels=3, **changes)
    return DeformableDetrConfig(**given), "DeformableDetrForObjectDetection"


def _grounded(prefix: str) -> Any:
    def make(**changes: Any) -> Any:
        import transformers

        text = transformers.BertConfig(
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            intermediate_size=WIDTH,
            vocab_size=1100,
        )
        given = _detr(
            text_config=text, encoder_n_points=2, num_feature_levels=3, max_text_len=8, **changes
        )
        return getattr(transformers, f"{prefix}Config")(**given), f"{prefix}ForObjectDetection"

    return make


def _like_rt_detr(prefix: str, **more: Any) -> Any:
    def make(**changes: Any) -> Any:
        import transformers

        config = getattr(transformers, f"{prefix}Config")
        return config(**_rt_detr(**(more | changes))), f"{prefix}ForObjectDetection"

    return make


def _pp_doclayout_v2(**changes: Any) -> Any:
    order = {
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_hidden_layers": 1,
        "intermediate_size": WIDTH,
        "coordinate_size": 6,
        "shape_size": 4,
        "num_classes": 2,
    }
    rules = {"class_thresholds": [0.5, 0.5], "class_order": [0, 1], "reading_order_config": order}
    return _like_rt_detr("PPDocLayoutV2", **rules)(**changes)


def _pp_doclayout_v3(**changes: Any) -> Any:
    features = {"backbone_config": _backbone(first=1), "x4_feat_dim": 4}
    return _like_rt_detr("PPDocLayoutV3", **features)(**changes)


def _windowed(prefix: str, backbone: str, **more: Any) -> Any:
    """Of LW-DETR's kind, whose backbones are transformers."""

    def make(**changes: Any) -> Any:
        import transformers

        vit = getattr(transformers, f"{backbone}Config")(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            mlp_ratio=1,
            image_size=SIZE,
            patch_size=16,
            num_windows=4,
            out_indices=[1, 2],
        )
        given = {
            "backbone_config": vit,
            "d_model": WIDTH,
            "num_queries": 5,
            "group_detr": 2,
            "c2f_num_blocks": 1,
            "decoder_layers": 2,
            "decoder_ffn_dim": WIDTH,
            "decoder_n_points": 3,
            "decoder_self_attention_heads": HEADS,
            "decoder_cross_attention_heads": HEADS,
        }
        config = getattr(transformers, f"{prefix}Config")(**(given | more | changes))
        return config, f"{prefix}ForObjectDetection"

    return make


def _omdet_turbo(**changes: Any) -> Any:
    from transformers import CLIPTextConfig, OmDetTurboConfig

    text = CLIPTextConfig(
        hidden_size=2 * WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        vocab_size=50,
        max_position_embeddings=8,
        bos_token_id=48,
        eos_token_id=49,
    )
    given = {
        "text_config": text,
        "backbone_config": _backbone(),
        "apply_layernorm_after_vision_backbone": False,
        "image_size": SIZE,
        "text_projection_in_dim": 2 * WIDTH,
        "text_projection_out_dim": 2 * WIDTH,
        "task_encoder_hidden_dim": WIDTH,
        "class_embed_dim": 2 * WIDTH,
        "num_queries": 5,
        "encoder_hidden_dim": WIDTH,
        "vision_features_channels": [WIDTH] * 3,
        "encoder_in_channels": [8, 8, WIDTH],
        "encoder_attention_heads": HEADS,
        "encoder_dim_feedforward": WIDTH,
        "decoder_hidden_dim": WIDTH,
        "decoder_num_heads": HEADS,
        "decoder_num_layers": 2,
        "decoder_num_points": 3,
        "decoder_dim_feedforward": WIDTH,
    }
    return OmDetTurboConfig(**(given | changes)), "OmDetTurboForObjectDetection"


def _segmenter(prefix: str, **more: Any) -> Any:
    def make(**changes: Any) -> Any:
        import transformers

        given = {
            "backbone_config": _backbone(first=1),
            "mask_feature_size": WIDTH,
            "hidden_dim": WIDTH,
            "encoder_feedforward_dim": WIDTH,
            "dim_feedforward": WIDTH,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "num_attention_heads": HEADS,
            "num_queries": 5,
        }
        config = getattr(transformers, f"{prefix}Config")(**(given | more | changes))
        return config, f"{prefix}Model"  # the heads need SciPy

    return make


_ONEFORMER = {
    "conv_dim": WIDTH,
    "mask_dim": WIDTH,
    "task_seq_len": 6,
    "text_encoder_width": WIDTH,
    "text_encoder_context_length": 6,
    "text_encoder_num_layers": 1,
    "text_encoder_vocab_size": 50,
    "text_encoder_n_ctx": 2,
    "query_dec_layers": 1,
}
_CONFIGS: dict[str, Any] = {
    "deformable_detr": _deformable_detr,
    "grounding_dino": _grounded("GroundingDino"),
    "mm_grounding_dino": _grounded("MMGroundingDino"),
    "lw_detr": _windowed("LwDetr", "LwDetrViT", projector_scale_factors=[2.0, 0.5]),
    "rf_detr": _windowed("RfDetr", "RfDetrDinov2"),
    "omdet_turbo": _omdet_turbo,
    "pp_doclayout_v2": _pp_doclayout_v2,
    "pp_doclayout_v3": _pp_doclayout_v3,
    "pp_doclayout_v4": _like_rt_detr("PPDocLayoutV4"),
    "rt_detr": _like_rt_detr("RTDetr"),
    "rt_detr_v2": _like_rt_detr("RTDetrV2"),
    "d_fine": _like_rt_detr("DFine", decoder_n_points=[2, 4, 3]),
    "deimv2": _like_rt_detr("Deimv2", decoder_n_points=[2, 4, 3]),
    "mask2former": _segmenter("Mask2Former", feature_size=WIDTH),
    "oneformer": _segmenter("OneFormer", **_ONEFORMER),
}


def _sentence() -> dict[str, Any]:
    """Words between the special tokens of BERT's vocabulary that grounding looks for."""
    words = torch.tensor([[101, 7, 1012, 8, 9, 1012, 102]]).repeat(2, 1)
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


def _classes() -> dict[str, Any]:
    """Three classes of each picture, and a task."""
    classes, task = torch.randint(1, 50, (6, 5)), torch.randint(1, 50, (2, 5))
    return {
        "classes_input_ids": classes,
        "classes_attention_mask": torch.ones_like(classes),
        "tasks_input_ids": task,
        "tasks_attention_mask": torch.ones_like(task),
        "classes_structure": torch.tensor([3, 3]),
    }


_TEXTS: dict[str, Any] = {
    "grounding_dino": _sentence,
    "mm_grounding_dino": _sentence,
    "omdet_turbo": _classes,
    "oneformer": lambda: {"task_inputs": torch.randint(1, 50, (2, 6))},
}
