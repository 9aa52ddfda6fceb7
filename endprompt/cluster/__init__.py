"""What runs around training on a SLURM cluster."""
