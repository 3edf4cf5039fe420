#!/usr/bin/env python
"""A model from anywhere, here torchvision's ViT without Detectron2; what is of ours is numbered.

python examples/any_model.py output/
"""

from __future__ import annotations

import sys

import torch
from torchvision.models import VisionTransformer

import peft_d2  # 1

METHODS = [
    {"NAME": "lora", "TARGETS": ["self_attention"], "PARTS": ["q", "v"], "RANK": 4},  # inside nn.MultiheadAttention
    {"NAME": "adaptformer", "TARGETS": ["encoder.layers.*.mlp"], "BOTTLENECK": 8},
]  # 2


def base() -> torch.nn.Module:
    """The pretrained model; here a small one with random weights."""
    torch.manual_seed(0)
    return VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)


def main(output: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Train a few steps; returns the model, and a fresh one that the saved adapter was loaded into."""
    model = base()
    print(peft_d2.inject(model, METHODS, train=["heads"]))  # 3
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    peft_d2.save_adapter(model, f"{output}/adapter")  # 4

    fresh = base()
    peft_d2.load_adapter(fresh, f"{output}/adapter")  # 5
    return model, fresh


if __name__ == "__main__":
    main(*sys.argv[1:])
