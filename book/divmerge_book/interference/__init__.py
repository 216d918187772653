"""What goes wrong when tasks meet, as numbers."""
