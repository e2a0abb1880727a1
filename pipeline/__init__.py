"""The mathematics and its edges: torch lives here; no path of `params.yaml` does."""
