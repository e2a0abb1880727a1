"""The `lkcache` command: one file a verb, imports inside the verb."""
