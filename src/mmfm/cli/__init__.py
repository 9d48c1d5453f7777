"""The commands of ``mmfm``: one thin module per stage, which parses arguments and calls the stage."""
