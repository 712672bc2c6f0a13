"""The command line: one file a subcommand. Alone knows flags; what is heavy is imported inside `run`."""
