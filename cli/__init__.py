"""The hope command."""
