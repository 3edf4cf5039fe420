"""Detectron2's side: config, registry entry, trainer, checkpoints. Import the modules by name."""
