"""The command line: commands, their options, and all that is printed."""
