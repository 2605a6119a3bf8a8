"""The command line: the commands with their options, and the display of their results."""
