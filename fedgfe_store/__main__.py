"""``python -m fedgfe_store``: the command line."""

from fedgfe_store.cli.main import main

main()
