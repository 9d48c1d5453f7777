"""Detectors, one module each; listed in mmfm.config.choices."""
