"""What a checkpoint can do along the position axis: distance probe, perplexity by position, physical needle test."""
