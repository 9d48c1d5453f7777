"""The commands of ``mmfm``: one thin module per stage, each parses, builds its settings, and calls."""
