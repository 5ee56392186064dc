"""Measuring Hope."""
