"""Evaluation with Detectron2's evaluators and result dicts, fast and without holding all masks at once."""
