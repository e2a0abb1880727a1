"""Golden files: what a change must not change unseen."""
