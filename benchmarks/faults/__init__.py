"""Faults that strike real studies, and an audit of what they left."""
