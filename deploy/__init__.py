"""Deployment on real machines: ``python -m deploy``; docs/deployment.md is the guide."""
