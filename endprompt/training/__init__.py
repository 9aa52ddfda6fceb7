"""What every engine's training run shares: schedule, run folder, monitoring, stopping, launching."""
