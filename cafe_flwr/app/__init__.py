"""From settings to parts to a run."""
