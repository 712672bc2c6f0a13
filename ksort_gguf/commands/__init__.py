"""Subcommands: each file has `configure_parser(subparsers)` and `run(args)`, and imports what is heavy inside `run`."""
