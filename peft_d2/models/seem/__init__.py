"""SEEM (Zou et al., NeurIPS 2023)."""
