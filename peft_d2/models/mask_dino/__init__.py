"""Mask DINO (Li et al., CVPR 2023)."""
