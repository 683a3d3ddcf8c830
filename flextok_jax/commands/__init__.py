"""What the subcommands of `flextok` do; cli.py parses the arguments and calls them."""
