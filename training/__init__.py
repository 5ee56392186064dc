"""What Hope is trained on, and how."""
