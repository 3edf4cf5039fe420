"""Mask2Former (Cheng et al., CVPR 2022)."""
