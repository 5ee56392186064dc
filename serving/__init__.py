"""Serve a Hope model: sessions, each with a memory of its own."""
