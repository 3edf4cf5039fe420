"""The image path of Segment Anything 2 (Ravi et al., arXiv 2408.00714)."""
