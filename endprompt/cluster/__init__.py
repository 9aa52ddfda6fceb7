"""What a run needs on a cluster: preflight, restarts, status."""
