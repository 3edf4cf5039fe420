"""From a backbone's maps to mask features and multi-scale features."""
