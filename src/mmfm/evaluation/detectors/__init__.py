"""The detectors, one module each; mmfm.config.choices names them."""
