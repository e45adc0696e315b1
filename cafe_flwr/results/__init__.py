"""What a run leaves: its records, its summary and its report."""
