"""Data sets: their registration, checks, records, mappers and loaders. Import from the modules.

The checks and the toy world work where Detectron2 is not installed.
"""
