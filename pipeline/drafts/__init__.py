"""One file a draft architecture, found by its name (`pipeline.draft.find`)."""
