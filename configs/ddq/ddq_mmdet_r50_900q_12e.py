"""DDQ-DETR with 900 queries, ResNet-50, 12 epochs: for the weights of MMDetection 3."""

from .ddq_r50_12e import dataloader, lr_multiplier, model, optimizer, train

model.initial_queries.num_queries = 900
train.output_dir = "./output/ddq_mmdet_r50_900q_12e"
