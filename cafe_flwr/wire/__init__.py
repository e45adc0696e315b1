"""The message contract between strategy and clients: what is sent, and what both ends make of it."""
