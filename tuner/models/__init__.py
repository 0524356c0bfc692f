"""Backbones: how they are made, where their weights come from, and how they are cut into layer groups."""
