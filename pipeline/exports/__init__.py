"""One file an export format, found by name (`pipeline.export`)."""
