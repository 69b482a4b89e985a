"""What treats each element by itself."""
