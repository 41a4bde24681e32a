"""Names of the weights of MMDetection 2, in which the released checkpoints are."""

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
    ],
    mark=r"bbox_head\.transformer\.encoder\.layers\.\d+\.attentions\.0\.sampling_offsets\..*",
    our_mark=r"encoder\.layers\.\d+\.attention\.sampling_offsets\..*",
    resizable=r"(decoder\.stages\.\d+|initial_queries)\.head\.classes\..*"
    r"|initial_queries\.embedding\.weight",
)
register_official_format(DEFORMABLE_DETR)
