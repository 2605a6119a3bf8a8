"""What the parties do with shares, offline and online."""
