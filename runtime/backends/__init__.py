"""What executes an engine, one file per executor."""
