"""The command line, ``fedgfe-store``: one module per command."""
