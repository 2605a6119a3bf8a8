"""What each command does: check everything, make or open a run folder, fill it. One file a command."""
