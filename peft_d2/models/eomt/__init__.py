"""EoMT: a ViT that segments by itself (Kerssies et al., CVPR 2025)."""
