"""Names of MMDetection's checkpoints: those of version 2, the released ones, and of version 3."""

from __future__ import annotations

from detection_toolkit.checkpoint.name_rules import Rule, resnet_rules
from detection_toolkit.checkpoint.official_format import OfficialFormat, register_official_format

__all__ = ["DEFORMABLE_DETR"]

_ENCODER = [
    ("attentions.0.*", "attention.*"),
    ("norms.0.*", "norm.*"),
    ("ffns.0.layers.0.0.*", "ffn.linear1.*"),
    ("ffns.0.layers.1.*", "ffn.linear2.*"),
    ("norms.1.*", "ffn.norm.*"),
]
_FFN_3 = [("ffn.layers.0.0.*", "ffn.linear1.*"), ("ffn.layers.1.*", "ffn.linear2.*")]
_DECODER = [
    ("attentions.0.attn.*", "self_attention.attention.*"),
    ("norms.0.*", "self_attention.norm.*"),
    ("attentions.1.*", "attention.*"),
    ("norms.1.*", "norm.*"),
    ("ffns.0.layers.0.0.*", "ffn.linear1.*"),
    ("ffns.0.layers.1.*", "ffn.linear2.*"),
    ("norms.2.*", "ffn.norm.*"),
]
_PROPOSALS = [
    ("transformer.enc_output.*", "memory.*"),
    ("transformer.enc_output_norm.*", "memory_norm.*"),
    ("transformer.pos_trans.*", "code.*"),
    ("transformer.pos_trans_norm.*", "code_norm.*"),
    # The proposals' head follows those of the six stages of the released models.
    ("cls_branches.6.*", "head.classes.*"),
    ("reg_branches.6.*", "head.box.*"),
    # Of the variants without proposals.
    ("query_embedding.*", "embedding.*"),
    ("transformer.reference_points.*", "reference_points.*"),
]
# Version 3 names otherwise what is not listed here. On the way back version 2 decides.
_ENCODER_3 = [("self_attn.*", "attention.*"), *_FFN_3, ("norms.1.*", "ffn.norm.*"), _ENCODER[1]]
_DECODER_3 = [
    ("self_attn.attn.*", "self_attention.attention.*"),
    ("cross_attn.*", "attention.*"),
    *_FFN_3,
    *(pair for pair in _DECODER if pair[0].startswith("norms.")),
]
_VERSION_3 = [
    Rule("level_embed", "encoder.level_embedding"),
    *(Rule("encoder.layers.{i}." + a, "encoder.layers.{i}." + b) for a, b in _ENCODER_3),
    *(Rule("decoder.layers.{t}." + a, "decoder.stages.{t}." + b) for a, b in _DECODER_3),
    Rule("memory_trans_fc.*", "initial_queries.memory.*"),
    Rule("memory_trans_norm.*", "initial_queries.memory_norm.*"),
    Rule("pos_trans_fc.*", "initial_queries.code.*"),
    Rule("pos_trans_norm.*", "initial_queries.code_norm.*"),
    Rule("query_embedding.*", "initial_queries.embedding.*"),
    Rule("reference_points_fc.*", "initial_queries.reference_points.*"),
]

DEFORMABLE_DETR = OfficialFormat(
    "Deformable DETR",
    [
        *resnet_rules(),
        Rule("neck.convs.{l}.conv.weight", "backbone.projections.{l}.weight"),
        Rule("neck.convs.{l}.gn.*", "backbone.projections.{l}.norm.*"),
        Rule("neck.extra_convs.0.conv.weight", "backbone.extra.weight"),
        Rule("neck.extra_convs.0.gn.*", "backbone.extra.norm.*"),
        Rule("bbox_head.transformer.level_embeds", "encoder.level_embedding"),
        *(
            Rule("bbox_head.transformer.encoder.layers.{i}." + a, "encoder.layers.{i}." + b)
            for a, b in _ENCODER
        ),
        *(
            Rule("bbox_head.transformer.decoder.layers.{t}." + a, "decoder.stages.{t}." + b)
            for a, b in _DECODER
        ),
        *(Rule("bbox_head." + a, "initial_queries." + b) for a, b in _PROPOSALS),
        Rule("bbox_head.cls_branches.{t}.*", "decoder.stages.{t}.head.classes.*"),
        Rule("bbox_head.reg_branches.{t}.*", "decoder.stages.{t}.head.box.*"),
        *_VERSION_3,
    ],
    # Of version 3, what its DINO does not have.
    mark=r"bbox_head\.transformer\.encoder\.layers\.\d+\.attentions\.0\.sampling_offsets\..*"
    r"|(reference_points_fc|pos_trans_fc)\..*",
    our_mark=r"encoder\.layers\.\d+\.attention\.sampling_offsets\..*",
    resizable=r"(decoder\.stages\.\d+|initial_queries)\.head\.classes\..*"
    r"|initial_queries\.embedding\.weight",
)
register_official_format(DEFORMABLE_DETR)
