"""One file a loss, found by its name (`pipeline.loss.find`)."""
