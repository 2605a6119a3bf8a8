"""Private inference between two parties."""
