"""What every exit minimises."""
