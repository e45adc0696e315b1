"""Basics that know nothing about learning: files, locks, log, options, random numbers, schemas of tensors, texts."""
