"""Scorers of the placement level, one family of policies per file."""
