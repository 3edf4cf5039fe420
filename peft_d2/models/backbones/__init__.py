"""Backbones beside those of Detectron2."""
