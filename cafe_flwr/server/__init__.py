"""The strategy: what the server decides, asks and averages."""
