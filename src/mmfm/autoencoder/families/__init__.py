"""The families of encoders, one module each; mmfm.config.choices names them."""
