"""The command line: how the commands are typed and shown."""
