"""What every part needs and no learning is in: files, locks, log, options, random numbers, names and shapes."""
