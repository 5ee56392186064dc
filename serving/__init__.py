"""Serving: a memory for every conversation, behind one model."""
