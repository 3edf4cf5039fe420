"""Segment Anything (Kirillov et al., ICCV 2023)."""
