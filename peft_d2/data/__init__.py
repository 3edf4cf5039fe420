"""Data sets: their registration, checks, records, mappers and loaders. Import from the modules.

The checks work where Detectron2 is not installed.
"""
